//! Arguments whose values are names defined in other crates.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

/// Parses one of `all` by its name; `describe` returns the name and its help text.
pub fn one_of<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    describe: fn(T) -> (&'static str, &'static str),
) -> impl TypedValueParser<Value = T> {
    let value = |one: &T| {
        let (name, meaning) = describe(*one);
        PossibleValue::new(name).help(meaning)
    };
    PossibleValuesParser::new(all.iter().map(value)).try_map(move |name| {
        all.iter().copied().find(|one| describe(*one).0 == name).ok_or("no value of this name")
    })
}
