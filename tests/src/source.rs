//! The repository's own files, as the tidy proofs read them.

use std::path::{Path, PathBuf};

/// A file of the repository.
pub struct File {
    /// Path from the root of the repository, with `/` between its parts.
    pub path: String,
    /// Its text.
    pub text: String,
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every text file of the repository whose name ends in one of `endings`, without what is built or made by a run.
pub fn files(endings: &[&str]) -> Vec<File> {
    let (mut found, mut folders) = (Vec::new(), vec![root()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                let is_made = matches!(name.as_str(), "target" | "runs" | ".git" | "__pycache__");
                folders.extend((!is_made).then_some(path));
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let local = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
                found.push(File { path: local, text: std::fs::read_to_string(&path).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

impl File {
    /// The code alone: comments, and the insides of strings and characters, are blank. Line breaks stay.
    pub fn code(&self) -> String {
        let (mut code, mut rest) = (String::new(), self.text.as_str());
        while let Some(first) = rest.chars().next() {
            let length = match first {
                '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
                '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
                '"' => string_length(rest),
                'r' if is_raw_string(&code, rest) => raw_string_length(rest),
                '\'' => char_length(rest),
                _ => 0,
            };
            let (blanked, kept) = if length > 0 { (length, 0) } else { (0, first.len_utf8()) };
            code.push_str(&rest[..kept]);
            code.extend(rest[..blanked].chars().map(|c| if c == '\n' { c } else { ' ' }));
            rest = &rest[blanked + kept..];
        }
        code
    }

    /// [`File::code`] without what is only built for tests: a file has its tests at its end.
    pub fn shipped_code(&self) -> String {
        let code = self.code();
        let end = code.find("#[cfg(test)]\nmod ").unwrap_or(code.len());
        code[..end].to_owned()
    }
}

/// Length of the string literal that `text` begins with, with its quotes.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return i + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    text.len()
}

/// Whether a raw string begins here, and not a name that holds an r.
fn is_raw_string(before: &str, text: &str) -> bool {
    let is_name = before.chars().next_back().is_some_and(|c| c.is_alphanumeric() && c != 'b' || c == '_');
    !is_name && text[1..].trim_start_matches('#').starts_with('"')
}

fn raw_string_length(text: &str) -> usize {
    let hashes = text[1..].find('"').unwrap_or(0);
    let close = format!("\"{}", "#".repeat(hashes));
    let start = hashes + 2;
    text[start..].find(&close).map_or(text.len(), |end| start + end + close.len())
}

/// Length of the character literal that `text` begins with; 0 for a lifetime.
fn char_length(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), Some(_)) => text[3..].find('\'').map_or(0, |end| end + 4),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

/// Whether `word` is in `code` as a whole name.
pub fn has_word(code: &str, word: &str) -> bool {
    let is_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        !is_name(code[..at].chars().next_back()) && !is_name(code[at + word.len()..].chars().next())
    })
}

/// (name, first line from 1, lines) of every function with a body in `code`.
pub fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let starts = code.match_indices("fn ").map(|(at, _)| at);
    let is_word = |&at: &usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
    let length = |at: usize| {
        let body = at + code[at..].find(['{', ';'])?;
        let mut depth = 0_usize;
        for (i, c) in code[body..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                ';' if depth == 0 => return None,
                _ => continue,
            }
            if depth == 0 {
                return Some(code[at..=body + i].lines().count());
            }
        }
        None
    };
    let describe = |at: usize| {
        let name: String = code[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        length(at).map(|lines| (name, code[..at].matches('\n').count() + 1, lines))
    };
    starts.filter(is_word).filter_map(describe).filter(|(name, ..)| !name.is_empty()).collect()
}

/// What `code` uses of its own crate: the names after `crate::`, also of a group in braces.
pub fn names_from_root(code: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => names.extend(group_names(group)),
            None => names.push(first_name(rest)),
        }
    }
    names
}

/// (name, module) of what the `pub use` lines of a crate's root re-export.
pub fn re_exports(code: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for line in code.split("\npub use ").skip(1) {
        let Some((path, _)) = line.split_once(';') else { continue };
        let (module, group) = (first_name(path), path.split_once('{').map(|(_, group)| group));
        let names = match group {
            Some(group) => group_names(group),
            None => path.rsplit("::").next().into_iter().collect(),
        };
        found.extend(names.into_iter().map(|name| (name, module)));
    }
    found
}

/// The first name of each item of a group whose opening brace is before `group`.
fn group_names(group: &str) -> Vec<&str> {
    let (mut names, mut depth, mut start) = (Vec::new(), 0_usize, 0);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(first_name(group[start..i].trim_start()));
                start = i + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn first_name(path: &str) -> &str {
    path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}
