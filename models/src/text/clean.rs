//! Cleaning of captions and prompts, as the models were trained with it.
//!
//! Source: Wan-Video/Wan2.1 `wan/modules/tokenizers.py` (clean = "whitespace") and the fixes that ftfy 6 makes by
//! default. Left out is the repair of mojibake (text decoded with the wrong encoding): save captions as UTF-8.

use unicode_normalization::UnicodeNormalization;

/// Cleans a text: HTML entities, terminal escapes, control characters, typographic quotes and ligatures, full- and
/// half-width forms, Unicode composition (NFC); then every run of white space becomes one space, none at the ends.
pub fn clean(text: &str) -> String {
    let fixed = fix(text);
    let unescaped = htmlize::unescape(htmlize::unescape(&fixed).as_ref()).into_owned();
    unescaped.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// ftfy's `fix_text`: line by line, each until nothing changes.
fn fix(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut entities = Entities::Unescape;
    for line in text.split_inclusive('\n') {
        // A `<` means that this is HTML, where entities have a meaning: kept here and in all lines after it.
        if line.contains('<') {
            entities = Entities::Keep;
        }
        let mut line = line.to_owned();
        // Each pass can only uncover another entity: a line has fewer passes than characters.
        for _ in 0..=line.len() {
            let fixed = fix_once(&line, entities);
            if fixed == line {
                break;
            }
            line = fixed;
        }
        out.push_str(&line);
    }
    out
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Entities {
    Unescape,
    Keep,
}

fn fix_once(text: &str, entities: Entities) -> String {
    let text = match entities {
        Entities::Unescape => unescape_unambiguous(text),
        Entities::Keep => text.to_owned(),
    };
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| replace(c, &mut out));
    let text = out.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}'], "\n");
    let text = remove_terminal_escapes(&text);
    text.chars().filter(|c| !is_unwanted(*c)).nfc().collect()
}

/// What the bytes 0x80 to 0x9f mean in Windows-1252; those without meaning stay themselves.
const WINDOWS_1252: &str = "€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8d}Ž\u{8f}\u{90}‘’“”•–—˜™š›œ\u{9d}žŸ";

/// Appends the plain form of a character.
fn replace(c: char, out: &mut String) {
    match c {
        // C1 control characters are Windows-1252 in disguise.
        '\u{80}'..='\u{9f}' => {
            let plain = WINDOWS_1252.chars().nth(c as usize - 0x80).unwrap_or(c);
            if plain != c { replace(plain, out) } else { out.push(c) }
        }
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
        '\u{201c}'..='\u{201f}' => out.push('"'),
        '\u{3000}' => out.push(' '),
        // Full-width ASCII, half-width Katakana and Hangul, full-width signs.
        '\u{ff01}'..='\u{ffef}' => out.extend(std::iter::once(c).nfkc()),
        _ => match LIGATURES.iter().find(|(ligature, _)| *ligature == c) {
            Some((_, letters)) => out.push_str(letters),
            None => out.push(c),
        },
    }
}

/// Latin ligatures and digraphs.
const LIGATURES: &[(char, &str)] = &[
    ('Ĳ', "IJ"),
    ('ĳ', "ij"),
    ('ŉ', "'n"),
    ('Ǳ', "DZ"),
    ('ǲ', "Dz"),
    ('ǳ', "dz"),
    ('Ǆ', "DŽ"),
    ('ǅ', "Dž"),
    ('ǆ', "dž"),
    ('Ǉ', "LJ"),
    ('ǈ', "Lj"),
    ('ǉ', "lj"),
    ('Ǌ', "NJ"),
    ('ǋ', "Nj"),
    ('ǌ', "nj"),
    ('ﬀ', "ff"),
    ('ﬁ', "fi"),
    ('ﬂ', "fl"),
    ('ﬃ', "ffi"),
    ('ﬄ', "ffl"),
    ('ﬅ', "ſt"),
    ('ﬆ', "st"),
];

/// Control characters that no text needs; white space, joiners and marks of direction stay.
fn is_unwanted(c: char) -> bool {
    matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}'
        | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

/// Removes `ESC [ digits and semicolons letter`.
fn remove_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        let body = rest[at + 2..].trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        out.push_str(&rest[..at]);
        match body.strip_prefix(|c: char| c.is_ascii_alphabetic()) {
            Some(behind) => rest = behind,
            None => {
                out.push_str("\u{1b}[");
                rest = &rest[at + 2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Longest entity name that ftfy looks at, without `&`, `#` and `;`.
const MAX_ENTITY: usize = 24;

/// Unescapes entities that end in a semicolon, so that "this&not that" stays.
fn unescape_unambiguous(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match entity_length(rest) {
            Some(n) => {
                out.push_str(&unescape_entity(&rest[..n]));
                rest = &rest[n..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Bytes of the `&name;` or `&#number;` that `text` starts with.
fn entity_length(text: &str) -> Option<usize> {
    let body = text.strip_prefix('&')?;
    let body = body.strip_prefix('#').unwrap_or(body);
    let n = body.bytes().take_while(u8::is_ascii_alphanumeric).count();
    let closed = (1..=MAX_ENTITY).contains(&n) && body[n..].starts_with(';');
    closed.then(|| text.len() - body.len() + n + 1)
}

fn unescape_entity(entity: &str) -> String {
    let plain = htmlize::unescape(entity);
    let is_whole = !plain.ends_with(';') || entity == "&semi;";
    if is_whole {
        return plain.into_owned();
    }
    // A name in capitals where only the small one exists: &EACUTE;.
    let small = entity.to_lowercase();
    let letter = htmlize::unescape(&small);
    let shouted = plain == entity && entity == entity.to_uppercase() && !entity.starts_with("&#");
    match shouted && !letter.ends_with(';') {
        true => letter.to_uppercase(),
        false => entity.to_owned(),
    }
}
