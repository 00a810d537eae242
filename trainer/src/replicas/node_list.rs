//! Lists of hosts as Slurm abbreviates them: `gpu[01-03,7],login`.

use super::error::{ReplicaError, Result};

/// More hosts than any job has: a typo such as `[1-999999999]` must not take all memory.
const MOST: usize = 1 << 16;

/// The hosts of `list`, in its order. Numbers keep their leading zeros; a name may have several brackets.
///
/// # Errors
/// Brackets that do not close, ranges that are not numbers or run backwards, more than 65536 hosts.
pub fn expand(list: &str) -> Result<Vec<String>> {
    let refuse = |why| ReplicaError::NodeList { list: list.to_owned(), why };
    let mut hosts = Vec::new();
    for part in parts(list).ok_or_else(|| refuse("its brackets do not match"))? {
        hosts.extend(names(part).map_err(refuse)?);
        if hosts.len() > MOST {
            return Err(refuse("it has more than 65536 hosts"));
        }
    }
    match hosts.is_empty() {
        true => Err(refuse("it is empty")),
        false => Ok(hosts),
    }
}

/// The parts between the commas outside of brackets; nothing where brackets do not match.
fn parts(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut begin, mut is_inside) = (Vec::new(), 0, false);
    for (at, character) in list.char_indices() {
        match (character, is_inside) {
            ('[', false) => is_inside = true,
            (']', true) => is_inside = false,
            ('[', true) | (']', false) => return None,
            (',', false) => {
                parts.push(&list[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[begin..]);
    parts.retain(|part| !part.trim().is_empty());
    (!is_inside).then(|| parts.into_iter().map(str::trim).collect())
}

/// The hosts of one part, whose first bracket varies slowest.
fn names(part: &str) -> Result<Vec<String>, &'static str> {
    let Some((before, rest)) = part.split_once('[') else { return Ok(vec![part.to_owned()]) };
    let (ranges, after) = rest.split_once(']').ok_or("its brackets do not match")?;
    let after = names(after)?;
    let mut hosts = Vec::new();
    for range in ranges.split(',') {
        for number in numbers(range)? {
            hosts.extend(after.iter().map(|after| format!("{before}{number}{after}")));
            if hosts.len() > MOST {
                return Err("it has more than 65536 hosts");
            }
        }
    }
    Ok(hosts)
}

/// `3` or `01-12`.
fn numbers(range: &str) -> Result<impl Iterator<Item = String>, &'static str> {
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|digit| digit.is_ascii_digit());
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    if !is_number(first) || !is_number(last) {
        return Err("a range in brackets is not made of numbers");
    }
    let parse = |text: &str| text.parse::<u32>().map_err(|_| "a number in brackets is too large");
    let (width, first, last) = (first.len(), parse(first)?, parse(last)?);
    match first <= last {
        true => Ok((first..=last).map(move |number| format!("{number:0width$}"))),
        false => Err("a range in brackets runs backwards"),
    }
}
