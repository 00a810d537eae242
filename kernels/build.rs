//! Builds the CUDA half when the feature `cuda` is on: each `cuda/*.cu` into one fat binary (machine code for the
//! architectures below and PTX for later ones), and the C++ shim over cuDNN's attention where its headers are found.

// A build script has no one to hand an error to but cargo.
#![allow(clippy::expect_used)]

#[path = "build/late.rs"]
mod late;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code is compiled for these: A100, 3090, 4090, H100/H200, 5090.
const ARCHITECTURES: [&str; 5] = ["80", "86", "89", "90", "120"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cudnn_headers)");
    println!("cargo::rustc-check-cfg=cfg(late)");
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // cargo sets it for every build script.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    for source in
        ["norm", "elementwise", "weight", "optimiser", "random", "volume", "conv3d", "softmax", "int8"]
    {
        let source = Path::new("cuda").join(source).with_extension("cu");
        if source.exists() {
            compile(&source, &out);
        }
    }
    attention_shim();
    if let Some(home) = toolkit() {
        late::link(&home, &out);
    }
}

/// One `.cu` file into a fat binary of the same name.
fn compile(source: &Path, out: &Path) {
    // The sources are named above.
    let target = out.join(source.file_stem().expect("sources are named")).with_extension("fatbin");
    let mut nvcc = Command::new(nvcc());
    nvcc.args(["-O3", "-std=c++17", "-fatbin", "--threads", "0"]).arg("-o").arg(&target).arg(source);
    for arch in ARCHITECTURES {
        nvcc.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    nvcc.arg("-gencode=arch=compute_80,code=compute_80");
    match nvcc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("nvcc could not compile {} ({status})", source.display()),
        Err(why) => panic!("the feature `cuda` needs nvcc, on PATH or in $CUDA_HOME/bin: {why}"),
    }
}

fn nvcc() -> PathBuf {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    home.filter(|path| path.exists()).unwrap_or_else(|| "nvcc".into())
}

/// The folder of the CUDA toolkit: the one that contains nvcc.
fn toolkit() -> Option<PathBuf> {
    let on_path = || {
        let folders = env::var_os("PATH")?;
        env::split_paths(&folders).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.exists())
    };
    let nvcc = Some(nvcc()).filter(|path| path.exists()).or_else(on_path)?;
    nvcc.canonicalize().ok()?.parent()?.parent().map(Path::to_owned)
}

/// The shim needs the headers of cuDNN 9.18 or later and of cudnn-frontend 1.x; without them attention is chunked.
fn attention_shim() {
    let variables = ["CUDNN_FRONTEND_INCLUDE", "CUDNN_INCLUDE"];
    variables.iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));
    // /usr/include is searched by itself, and must not come before the C++ library's own folders.
    let usual = ["/usr/local/cuda/include"].map(PathBuf::from);
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    let named = variables.iter().filter_map(env::var_os).map(PathBuf::from);
    let folders: Vec<PathBuf> = named.chain(home).chain(usual).filter(|folder| folder.exists()).collect();
    let missing =
        ["cudnn_frontend.h", "cudnn.h"].map(|header| !folders.iter().any(|f| f.join(header).exists()));
    if missing.contains(&true) {
        println!(
            "cargo::warning=cudnn_frontend.h or cudnn.h not found (set CUDNN_FRONTEND_INCLUDE and CUDNN_INCLUDE): \
             attention will run in chunks of matrix products, several times slower"
        );
        return;
    }
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).warnings(false).file("cuda/attention.cpp");
    for folder in &folders {
        build.flag("-isystem").flag(folder);
    }
    build.compile("tandem_attention");
    println!("cargo::rustc-cfg=cudnn_headers");
    println!("cargo::rustc-link-lib=dylib=dl");
}
