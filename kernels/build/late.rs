//! The build's half of `late.c`: lists CUDA's functions from the toolkit's headers, and links the jumps in.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// Libraries with the headers that declare their functions and what these begin with.
const LIBRARIES: [(&str, &[&str], &[&str]); 5] = [
    ("cuda", &["cuda.h"], &["cu"]),
    ("cudart", &["cuda_runtime_api.h", "crt/host_runtime.h", "crt/device_functions.h"], &["cuda", "__cuda"]),
    ("cublas", &["cublas_api.h", "cublas_v2.h"], &["cublas"]),
    ("cublasLt", &["cublasLt.h"], &["cublasLt"]),
    ("curand", &["curand.h"], &["curand"]),
];

/// Names that the compiler makes and no header spells.
const MADE: [&str; 3] = ["__cudaGetKernel", "__cudaLaunchKernel", "__cudaLaunchKernel_ptsz"];

/// The header's macros for functions that exist a second time, for code whose default stream is its thread's own, and what
/// their names then end with.
const PER_THREAD: [(&str, &str); 2] = [("__CUDART_API_PTSZ(", "_ptsz"), ("__CUDART_API_PTDS(", "_ptds")];

/// Links the jumps into everything that uses this crate. Where the toolkit `home` has no headers, or the linker is not
/// one that lets an own function go before a library's, the program needs CUDA to start, as programs do.
pub fn link(home: &Path, out: &Path) {
    let names: Vec<(String, BTreeSet<String>)> =
        LIBRARIES.iter().filter_map(|library| of(home, library)).collect();
    if names.len() < LIBRARIES.len() {
        println!(
            "cargo::warning=not all of CUDA's headers are in {}: this program will need CUDA to start, and its tensors come \
             from the driver's pool, whose fragmentation no plan counts",
            home.display()
        );
        return;
    }
    let mut list = String::new();
    let mut listed = BTreeSet::new();
    for (file, functions) in names {
        // Writing to a String does not fail.
        let _ = writeln!(list, "LIBRARY(\"{file}\")");
        for name in functions.into_iter().filter(|name| listed.insert(name.clone())) {
            let _ = writeln!(list, "FUNCTION({name})");
        }
    }
    if fs::write(out.join("late_functions.h"), list).is_err() {
        return;
    }
    cc::Build::new()
        .file("build/late.c")
        .include(out)
        .warnings(false)
        .cargo_metadata(false)
        .compile("tandem_late");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=tandem_late");
    println!("cargo::rustc-link-lib=dylib=dl");
    println!("cargo::rustc-cfg=late");
}

/// The file of a library and its functions, by the headers in `home`.
fn of(home: &Path, (name, headers, begins): &(&str, &[&str], &[&str])) -> Option<(String, BTreeSet<String>)> {
    let text: String = headers
        .iter()
        .filter_map(|header| fs::read_to_string(home.join("include").join(header)).ok())
        .collect();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_function = |word: &&str| {
        let after = begins.iter().find_map(|begin| word.strip_prefix(begin));
        after.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
    };
    let mut functions: BTreeSet<String> =
        text.split(|c| !is_word(c)).filter(is_function).map(str::to_owned).collect();
    if *name == "cudart" {
        functions.extend(MADE.map(str::to_owned));
        functions
            .extend(PER_THREAD.iter().flat_map(|(macro_name, suffix)| of_thread(&text, macro_name, suffix)));
    }
    (!functions.is_empty()).then_some((file(name, home)?, functions))
}

/// The second names of the functions that `text` has within `macro_name`.
fn of_thread(text: &str, macro_name: &str, suffix: &str) -> Vec<String> {
    let named = text.split(macro_name).skip(1).filter_map(|rest| rest.split_once(')'));
    named.map(|(name, _)| format!("{}{suffix}", name.trim())).collect()
}

/// The name that programs ask for the library by: the driver's own, else the one in the toolkit.
fn file(name: &str, home: &Path) -> Option<String> {
    if name == "cuda" {
        return Some("libcuda.so.1".to_owned());
    }
    let begin = format!("lib{name}.so.");
    let is_asked_for = |found: &String| {
        found.strip_prefix(&begin).is_some_and(|version| version.chars().all(|c| c.is_ascii_digit()))
    };
    let folders =
        ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|at| home.join(at));
    let found = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    found.map(|entry| entry.file_name().to_string_lossy().into_owned()).find(is_asked_for)
}
