//! Matching clip ids against patterns such as `hero/*` and `*_night.mp4`.

/// Whether `pattern` matches the whole of `id`: `*` matches any run of characters (also across folders), `?` one.
/// A pattern without `/` is also tried against the file name alone, so `intro*.mp4` works in any folder.
pub fn matches(pattern: &str, id: &str) -> bool {
    let name = id.rsplit('/').next().unwrap_or(id);
    matches_all(pattern, id) || (!pattern.contains('/') && matches_all(pattern, name))
}

fn matches_all(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at_pattern, mut at_text) = (0, 0);
    // Only the last star can need to swallow more, so one remembered position replaces recursion.
    let mut last_star: Option<(usize, usize)> = None;
    while at_text < text.len() {
        match pattern.get(at_pattern) {
            Some('*') => {
                last_star = Some((at_pattern, at_text));
                at_pattern += 1;
            }
            Some(&wanted) if wanted == '?' || wanted == text[at_text] => {
                at_pattern += 1;
                at_text += 1;
            }
            _ => {
                let Some((star, swallowed)) = last_star else { return false };
                last_star = Some((star, swallowed + 1));
                at_pattern = star + 1;
                at_text = swallowed + 1;
            }
        }
    }
    pattern[at_pattern..].iter().all(|&rest| rest == '*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_cross_folders_and_bare_patterns_match_file_names() {
        assert!(matches("*.mp4", "a/b/c.mp4"));
        assert!(matches("a/*", "a/b/c.mp4"));
        assert!(matches("c?mp4", "a/b/c.mp4"));
        assert!(matches("*a*b*", "xxaxxbxx"));
        assert!(!matches("b/*", "a/b/c.mp4"));
        assert!(!matches("c", "a/b/c.mp4"));
        assert!(matches("", ""));
    }
}
