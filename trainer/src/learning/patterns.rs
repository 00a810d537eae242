//! Settings of modules by pattern: each pattern names something that is trained, and no module has two.

use models::adapter::{Target, names_module};

use crate::error::{Error, Result};

/// Checks the `patterns` of the table `key` against the modules that are trained. `what` is what a module has one of.
///
/// # Errors
/// A pattern that names nothing that is trained, and two that name one module.
pub fn check<'a>(
    key: &str,
    patterns: impl Iterator<Item = &'a String> + Clone,
    targets: &[Target],
    what: &str,
) -> Result<()> {
    let refuse = |why: String| Err(Error::Setting { key: key.to_owned(), why });
    for target in targets {
        let named = patterns.clone().filter(|pattern| names_module(pattern, &target.module));
        if let [first, second, ..] = named.collect::<Vec<_>>().as_slice() {
            return refuse(format!(
                "\"{first}\" and \"{second}\" both name {}, which can have one {what}: make one of them narrower",
                target.module
            ));
        }
    }
    for pattern in patterns {
        if !targets.iter().any(|target| names_module(pattern, &target.module)) {
            let first = targets.first().map_or("none", |target| target.module.as_str());
            return refuse(format!(
                "\"{pattern}\" names no module that is trained; the first of them is {first}"
            ));
        }
    }
    Ok(())
}
