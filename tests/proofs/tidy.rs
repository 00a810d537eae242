//! The house rules, checked on the repository's own sources.

use std::collections::{BTreeMap, BTreeSet};

use proofs::source::{File, files, functions, has_word, names_from_root, re_exports};

const CRATES: [&str; 5] = ["kernels", "models", "data", "trainer", "tests"];

fn rust() -> Vec<File> {
    let files = files(&[".rs"]);
    assert!(
        CRATES.iter().all(|name| files.iter().any(|file| file.path.starts_with(name))),
        "sources are missing"
    );
    files
}

/// What is shipped: the sources of the four crates, not the proofs, and not what cargo runs before it builds them.
fn shipped() -> impl Iterator<Item = File> {
    let is_shipped =
        |file: &File| !file.path.starts_with("tests/") && !file.path.starts_with("kernels/build");
    rust().into_iter().filter(is_shipped)
}

#[track_caller]
fn assert_none(rule: &str, offenders: Vec<String>) {
    assert!(offenders.is_empty(), "{rule}:\n  {}", offenders.join("\n  "));
}

/// (line number, line) of the lines of `code` for which `is_bad` holds, as `path:line`.
fn places(file: &File, code: &str, is_bad: impl Fn(&str) -> bool) -> Vec<String> {
    let lines = code.lines().enumerate().filter(|(_, line)| is_bad(line));
    lines.map(|(i, line)| format!("{}:{}: {}", file.path, i + 1, line.trim())).collect()
}

#[test]
fn files_and_functions_are_short() {
    let mut offenders = Vec::new();
    for file in rust() {
        let lines = file.text.lines().count();
        if lines > 500 {
            offenders.push(format!("{}: {lines} lines, 500 are allowed", file.path));
        }
        for (name, line, lines) in functions(&file.code()) {
            if lines > 80 {
                offenders.push(format!("{}:{line}: {name} has {lines} lines, 80 are allowed", file.path));
            }
        }
    }
    assert_none("too long", offenders);
}

#[test]
fn unsafe_code_is_in_kernels_and_says_why_it_is_sound() {
    let mut offenders = Vec::new();
    for file in rust() {
        let (code, lines): (String, Vec<&str>) = (file.code(), file.text.lines().collect());
        for (i, _) in code.lines().enumerate().filter(|(_, line)| has_word(line, "unsafe")) {
            let above = lines[..i].iter().rev().take_while(|line| line.trim().starts_with("//"));
            let is_explained = above.into_iter().any(|line| line.contains("SAFETY:"));
            if !is_explained || !file.path.starts_with("kernels/") {
                offenders.push(format!("{}:{}", file.path, i + 1));
            }
        }
    }
    assert_none("unsafe outside kernels, or without a SAFETY comment directly above", offenders);
}

/// Unless a comment next to it says why it cannot fail.
#[test]
fn shipped_code_does_not_unwrap() {
    let mut offenders = Vec::new();
    for file in shipped() {
        let lines: Vec<&str> = file.text.lines().collect();
        for (i, line) in file.shipped_code().lines().enumerate() {
            let is_explained = lines[i].contains("// ") || (i > 0 && lines[i - 1].trim().starts_with("// "));
            if (line.contains(".unwrap()") || line.contains(".expect(")) && !is_explained {
                offenders.push(format!("{}:{}", file.path, i + 1));
            }
        }
    }
    assert_none("unwrap or expect without the invariant in a comment", offenders);
}

/// candle's stock layers drop gradients without a word, and its autograd keeps gradients of frozen weights.
#[test]
fn the_trained_path_uses_no_stock_layer_and_no_autograd() {
    let is_trained = |file: &File| {
        ["kernels/", "models/src/dit", "models/src/adapter", "trainer/"]
            .iter()
            .any(|at| file.path.starts_with(at))
    };
    let mut offenders = Vec::new();
    for file in shipped().filter(is_trained) {
        let is_bad = |line: &str| {
            let names =
                ["candle_nn", "softmax_last_dim", "rms_norm_slow", "layer_norm_slow", "GradStore", "Var"];
            names.iter().any(|name| has_word(line, name)) || line.contains(".backward()")
        };
        offenders.extend(places(&file, &file.shipped_code(), is_bad));
    }
    assert_none("stock layers or autograd on the trained path", offenders);
}

#[test]
fn crates_depend_in_one_direction() {
    let forbidden: [(&str, &[&str]); 4] = [
        ("kernels", &["models", "data", "trainer", "tandem-", "candle-nn"]),
        ("models", &["data", "trainer", "tandem-", "candle"]),
        ("data", &["kernels", "models", "trainer", "tandem-", "candle", "cudarc"]),
        ("trainer", &["candle"]),
    ];
    let mut offenders = Vec::new();
    for (name, foreign) in forbidden {
        let path = format!("{name}/Cargo.toml");
        let manifest = files(&["Cargo.toml"]).into_iter().find(|file| file.path == path).unwrap();
        let dependencies = manifest.text.split_once("[dependencies]").unwrap().1;
        let is_bad = |line: &str| foreign.iter().any(|crate_name| line.starts_with(crate_name));
        offenders.extend(places(&manifest, dependencies, is_bad));
    }
    assert_none("a dependency against the arrows kernels <- models <- trainer -> data", offenders);
}

#[test]
fn one_file_prints() {
    let mut offenders = Vec::new();
    // A build script speaks to cargo by printing.
    let speaks = |file: &File| file.path == "trainer/src/watch/ui.rs" || file.path.ends_with("build.rs");
    for file in shipped().filter(|file| !speaks(file)) {
        let is_bad = |line: &str| {
            ["println!", "eprintln!", "print!", "eprint!", "dbg!", "stdout()", "stderr()"]
                .iter()
                .any(|word| line.contains(word))
        };
        offenders.extend(places(&file, &file.shipped_code(), is_bad));
    }
    assert_none("printed past trainer/src/watch/ui.rs", offenders);
}

#[test]
fn nothing_is_left_for_later() {
    let mut offenders = Vec::new();
    // The needles are concatenated here, so that this file does not contain them.
    let needles =
        [["TO", "DO"], ["FIX", "ME"], ["unimple", "mented!"], ["to", "do!"]].map(|halves| halves.concat());
    for file in files(&[".rs", ".toml", ".md", ".py", ".sh"]) {
        offenders.extend(places(&file, &file.text, |line| needles.iter().any(|n| line.contains(n.as_str()))));
    }
    assert_none("left for later", offenders);
}

/// The modules of `trainer` are listed in `lib.rs` in the order in which they build on each other: each uses those before it,
/// and none behind it. What is listed after `cli` belongs to all.
#[test]
fn modules_of_the_trainer_use_each_other_in_one_direction() {
    let files = rust();
    let lib = files.iter().find(|file| file.path == "trainer/src/lib.rs").unwrap().code();
    let modules: Vec<&str> =
        lib.lines().filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let rooms = &modules[..=modules.iter().position(|module| *module == "cli").unwrap()];
    assert!(rooms.len() > 10, "the list is gone: {rooms:?}");
    let (mut offenders, mut uses) = (Vec::new(), 0);
    for file in files.iter().filter(|file| file.path.starts_with("trainer/src/")) {
        let own = file.path["trainer/src/".len()..].split(['/', '.']).next().unwrap();
        let Some(own) = rooms.iter().position(|room| *room == own) else { continue };
        for (i, line) in file.shipped_code().lines().enumerate() {
            for used in line.split("crate::").skip(1) {
                let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                uses += usize::from(rooms.contains(&used));
                if rooms.iter().skip(own + 1).any(|room| *room == used) {
                    offenders.push(format!("{}:{}: uses {used}", file.path, i + 1));
                }
            }
        }
    }
    assert!(uses > 100, "only {uses} uses found: the search is broken");
    assert_none("a module uses one that builds on it", offenders);
}

/// The modules at the top of a library use each other without circles: each can be read after those that it uses.
#[test]
fn modules_of_the_libraries_use_each_other_without_circles() {
    // What belongs to all: `error` of `models` collects the errors of every module, and `cuda` is the GPU half of the modules
    // beside it, which call it and whose types it takes.
    let libraries: [(&str, &[&str]); 3] = [("data", &[]), ("kernels", &["cuda"]), ("models", &["error"])];
    let (files, mut offenders) = (rust(), Vec::new());
    for (library, of_all) in libraries {
        let mut uses = module_uses(&files, &format!("{library}/src/"), of_all);
        let count: usize = uses.values().map(BTreeSet::len).sum();
        assert!(count > 20, "only {count} uses found in {library}: the search is broken");
        // A module that uses none of the rest, or that none of the rest uses, is in no circle.
        loop {
            let used: BTreeSet<String> = uses.values().flatten().cloned().collect();
            let before = uses.len();
            uses.retain(|module, used_by_it| !used_by_it.is_empty() && used.contains(module));
            let left: BTreeSet<String> = uses.keys().cloned().collect();
            uses.values_mut().for_each(|used_by_it| used_by_it.retain(|module| left.contains(module)));
            if uses.len() == before {
                break;
            }
        }
        offenders.extend(uses.iter().map(|(module, used)| format!("{library}: {module} uses {used:?}")));
    }
    assert_none("modules in a circle", offenders);
}

/// What each top module of the library at `root` uses of the others, without those in `of_all`.
fn module_uses(files: &[File], root: &str, of_all: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let lib = files.iter().find(|file| file.path == format!("{root}lib.rs")).unwrap().shipped_code();
    let re_exports: BTreeMap<&str, &str> = re_exports(&lib).into_iter().collect();
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let module_of = |path: &str| path.strip_prefix(root)?.split(['/', '.']).next().map(str::to_owned);
    for file in files {
        if let Some(module) = module_of(&file.path).filter(|module| module != "lib") {
            let names: Vec<String> =
                names_from_root(&file.shipped_code()).into_iter().map(str::to_owned).collect();
            uses.entry(module).or_default().extend(names);
        }
    }
    let modules: BTreeSet<String> =
        uses.keys().filter(|module| !of_all.contains(&module.as_str())).cloned().collect();
    uses.retain(|module, _| modules.contains(module));
    for (module, used) in &mut uses {
        let home = |name: &String| match re_exports.get(name.as_str()) {
            Some(home) if !modules.contains(name) => (*home).to_owned(),
            _ => name.clone(),
        };
        *used = used.iter().map(home).filter(|name| name != module && modules.contains(name)).collect();
    }
    uses
}

/// A clone works anywhere: no file names the machine that it was written on, and every crate comes from crates.io.
#[test]
fn no_file_knows_its_machine() {
    let homes =
        [["/ro", "ot/"], ["/ho", "me/"], ["/wo", "rk/"], ["/Us", "ers/"], ["C:", "\\"]].map(|p| p.concat());
    let sources =
        [["[sou", "rce."], ["replace", "-with"], ["index-", "url"], ["127.0", ".0.1"]].map(|p| p.concat());
    let is_bad = |line: &str| homes.iter().chain(&sources).any(|needle| line.contains(needle.as_str()));
    let mut offenders = Vec::new();
    for file in files(&[".rs", ".toml", ".md", ".py", ".sh", ".json", ".txt", ".lock", ".yml", "run"]) {
        offenders.extend(places(&file, &file.text, is_bad));
    }
    let lock = files(&["Cargo.lock"]).remove(0);
    let is_foreign = |line: &str| {
        line.starts_with("source = ")
            && line != "source = \"registry+https://github.com/rust-lang/crates.io-index\""
    };
    offenders.extend(places(&lock, &lock.text, is_foreign));
    assert_none("paths or registries of one machine", offenders);
}

/// A public function of `kernels` that computes a gradient is called by name in the proofs of gradients.
#[test]
fn every_backward_has_its_proof() {
    let files = rust();
    let proofs = files.iter().find(|file| file.path == "tests/proofs/gradients.rs").unwrap().code();
    let (mut offenders, mut seen) = (Vec::new(), 0);
    for file in files.iter().filter(|file| file.path.starts_with("kernels/src/")) {
        let module = file.path.trim_start_matches("kernels/src/").trim_end_matches(".rs").replace('/', "::");
        for (name, line, _) in functions(&file.shipped_code()) {
            let is_public = file.text.lines().nth(line - 1).is_some_and(|l| l.trim().starts_with("pub fn"));
            if is_public && name.contains("backward") {
                seen += 1;
                if !proofs.contains(&format!("{module}::{name}(")) {
                    offenders.push(format!("{module}::{name}"));
                }
            }
        }
    }
    assert!(seen >= 8, "only {seen} backward functions found: the search is broken");
    assert_none("no proof in tests/proofs/gradients.rs", offenders);
}

/// The reader that these rules rest on: what is a comment, a string or a lifetime to the compiler is one here too.
#[test]
fn the_rules_read_code_as_the_compiler_does() {
    let text = concat!(
        "fn a<'a>(x: &'a str) -> char { '{' } // } unsafe\n",
        "/* fn no() { */ fn b() {\n let s = \"} \\\" {\"; let r = r#\"\" }\"#; let q = '\\''; let n = b'\"';\n}\n",
        "fn declared(x: u8);\nfn c() { f(|x| { x }) }\n",
    );
    let code = File { path: String::new(), text: text.to_owned() }.code();
    let names: Vec<(String, usize, usize)> = functions(&code);
    let expected = [("a", 1, 1), ("b", 2, 3), ("c", 6, 1)].map(|(n, at, lines)| (n.to_owned(), at, lines));
    assert_eq!(names, expected, "{code}");
    let used = names_from_root("use crate::{a::{B, c}, d};\nfn f() { crate::e::g() }");
    assert_eq!(used, ["a", "d", "e"]);
    assert_eq!(re_exports("\npub use a::{B, c};\npub use d::E;"), [("B", "a"), ("c", "a"), ("E", "d")]);
    assert!(!has_word(&code, "unsafe") && code.lines().count() == text.lines().count());
}
