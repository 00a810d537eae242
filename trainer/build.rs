//! Names the version: the package's, and the commit where whoever builds the program gives it, as `wheel.sh` does.
//!
//! It is not asked of git here, since each commit would then build the crate again.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=TANDEM_COMMIT");
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    match env::var("TANDEM_COMMIT") {
        Ok(commit) if !commit.is_empty() => println!("cargo::rustc-env=TANDEM_VERSION={version} ({commit})"),
        _ => println!("cargo::rustc-env=TANDEM_VERSION={version}"),
    }
}
