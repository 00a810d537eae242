//! What clips are trained with: captions as they were found, and what the rules of a recipe make of them.
//!
//! Everything that will be drawn is known before training, since texts are encoded once and cached: a caption whose tags are
//! shuffled has a fixed number of arrangements, each a function of the clip and of its own number.

use std::collections::BTreeMap;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::error::{DataError, Result};
use crate::random::Random;

/// Texts of one clip at most: each is encoded and cached.
const MAX_TEXTS: usize = 1000;
/// Arrangements of a caption at most.
const MAX_ARRANGEMENTS: usize = 256;
/// Probability with which a tag is left out, at most.
const MAX_DROP: f64 = 0.95;
/// Stands for the caption in a template.
const CAPTION: &str = "{caption}";
/// Stands for the trigger in a template or a caption.
const TRIGGER: &str = "{trigger}";

/// Where captions come from and what is made of them. In a recipe the name of a source alone, such as `captions = "txt"`, or a
/// table.
///
/// ```
/// let text = r#"{ "folder": "clips", "captions": { "shuffle_tags": true, "keep_tags": 1 } }"#;
/// let config: data::DataConfig = serde_json::from_str(text).unwrap();
/// assert_eq!(config.captions.source, data::CaptionSource::Auto);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionRules {
    /// Where captions are read from. Default `auto`: the folder's metadata file if there is one, else text files.
    pub source: CaptionSource,
    /// Whether a text file is one caption, or has one on each line, of which one is drawn for each sample. Lists of captions in
    /// `metadata.jsonl` and in a `.json` file beside a clip are always several. Default `one`.
    pub per_file: PerFile,
    /// Words and what they are replaced by, such as `{ "a man" = "sks" }`: whole words, in this case, all at once. Default: none.
    pub replace: BTreeMap<String, String>,
    /// Texts in which `{caption}` stands for the caption and `{trigger}` for the trigger; of several one is drawn for each
    /// sample. Default: the caption alone.
    pub templates: Vec<String>,
    /// Text put behind each caption, exactly as written. Default: none.
    pub suffix: String,
    /// What stands between the tags of a caption. Default `,`.
    pub tag_separator: String,
    /// Whether the order of tags is drawn. Default: no.
    pub shuffle_tags: bool,
    /// Tags at the beginning that are neither shuffled nor left out. Default 0.
    pub keep_tags: usize,
    /// Probability with which each other tag is left out, 0 to 0.95; one tag always stays. Default 0.
    pub drop_tags: f64,
    /// How many arrangements of each caption are made where tags are shuffled or left out, 1 to 256: each is encoded once, and one
    /// of them is drawn for each sample. Default 8.
    pub arrangements: usize,
}

impl Default for CaptionRules {
    fn default() -> Self {
        Self {
            source: CaptionSource::Auto,
            per_file: PerFile::One,
            replace: BTreeMap::new(),
            templates: Vec::new(),
            suffix: String::new(),
            tag_separator: ",".into(),
            shuffle_tags: false,
            keep_tags: 0,
            drop_tags: 0.0,
            arrangements: 8,
        }
    }
}

/// Where the caption of a clip is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptionSource {
    /// The metadata file of the clip's folder if there is one, else a text file next to the clip.
    #[default]
    Auto,
    /// A `.txt` file of the same stem next to each clip, or a `.json` file with a list; metadata files are ignored.
    Txt,
    /// Only `metadata.jsonl` or `metadata.csv`; text files are ignored.
    Metadata,
}

/// How many captions a text file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PerFile {
    /// The whole file is one.
    #[default]
    One,
    /// Each line that is not blank is one.
    Lines,
}

/// What a clip is trained with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Texts {
    /// The first caption, its tags as they were written: for the held-out loss, and to be shown.
    pub plain: String,
    /// What is drawn from for each sample, at least one; some may be equal.
    pub drawn: Vec<String>,
}

impl CaptionRules {
    /// Whether tags are shuffled or left out.
    fn arranges(&self) -> bool {
        self.shuffle_tags || self.drop_tags > 0.0
    }

    /// Checks every value.
    pub(crate) fn check(&self, trigger: Option<&str>) -> Result<()> {
        let refuse = |reason: String| Err(DataError::Config { key: "captions", reason });
        if !(0.0..=MAX_DROP).contains(&self.drop_tags) {
            return refuse(format!("drop_tags is {}; it must be between 0 and {MAX_DROP}", self.drop_tags));
        }
        if !(1..=MAX_ARRANGEMENTS).contains(&self.arrangements) {
            let count = self.arrangements;
            return refuse(format!("arrangements is {count}; it must be between 1 and {MAX_ARRANGEMENTS}"));
        }
        if self.tag_separator.trim().is_empty() {
            return refuse("tag_separator must hold a character that is no space, such as \",\"".into());
        }
        if self.keep_tags > 0 && !self.arranges() {
            return refuse("keep_tags only has a meaning with shuffle_tags or drop_tags".into());
        }
        if let Some(word) = self.replace.keys().find(|word| word.trim().is_empty()) {
            return refuse(format!("replace has \"{word}\", which is no word"));
        }
        for template in &self.templates {
            if !template.contains(CAPTION) && !template.contains(TRIGGER) {
                return refuse(format!("the template \"{template}\" has neither {CAPTION} nor {TRIGGER}"));
            }
            if template.contains(TRIGGER) && trigger.is_none() {
                return refuse(format!(
                    "the template \"{template}\" has {TRIGGER}, and data.trigger is not set"
                ));
            }
        }
        Ok(())
    }

    /// The tags of `caption` as the arrangement `number` of the clip `id` has them.
    fn arranged(&self, caption: &str, id: &str, number: usize) -> String {
        let tags = caption.split(self.tag_separator.as_str()).map(str::trim).filter(|tag| !tag.is_empty());
        let mut kept: Vec<&str> = tags.collect();
        let mut rest = kept.split_off(self.keep_tags.min(kept.len()));
        let mut random = Random::new(seed_of(&[id, caption]), number as u64);
        if self.shuffle_tags {
            random.shuffle(&mut rest);
        }
        let is_kept: Vec<bool> = rest.iter().map(|_| random.unit() >= self.drop_tags).collect();
        let mut left: Vec<&str> =
            rest.iter().zip(is_kept).filter(|(_, is_kept)| *is_kept).map(|(tag, _)| *tag).collect();
        if kept.is_empty() && left.is_empty() {
            left.extend(rest.first());
        }
        kept.append(&mut left);
        kept.join(&format!("{} ", self.tag_separator.trim_end()))
    }
}

/// What stands in front of captions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Front<'a> {
    /// The word that is put in front of each caption that does not have it.
    pub trigger: Option<&'a str>,
    /// Text in front of everything.
    pub prefix: &'a str,
}

impl CaptionRules {
    /// What the clip `id` with these `captions`, as they were found, is trained with.
    ///
    /// # Errors
    /// More texts than a clip may have, and `{trigger}` in a caption where there is none; why.
    pub(crate) fn texts(
        &self,
        front: Front,
        id: &str,
        captions: &[String],
    ) -> std::result::Result<Texts, String> {
        let of_each = if self.arranges() { self.arrangements } else { 1 };
        let count = captions.len() * self.templates.len().max(1) * of_each;
        if count > MAX_TEXTS {
            return Err(format!(
                "its captions, templates and arrangements make {count} texts; at most {MAX_TEXTS} are allowed for a clip"
            ));
        }
        if front.trigger.is_none() && captions.iter().any(|caption| caption.contains(TRIGGER)) {
            return Err(format!("its caption has {TRIGGER}, and data.trigger is not set"));
        }
        let own = ["{caption}".to_owned()];
        let templates = if self.templates.is_empty() { &own[..] } else { &self.templates };
        let replaced: Vec<String> = captions.iter().map(|text| replace_words(text, &self.replace)).collect();
        let mut drawn = Vec::with_capacity(count);
        for (caption, template) in
            replaced.iter().flat_map(|caption| templates.iter().map(move |t| (caption, t)))
        {
            match self.arranges() {
                true => drawn.extend(
                    (0..of_each).map(|n| self.finished(front, &self.arranged(caption, id, n), template)),
                ),
                false => drawn.push(self.finished(front, caption, template)),
            }
        }
        let first = replaced.first().map_or("", String::as_str);
        Ok(Texts { plain: self.finished(front, first, &templates[0]), drawn })
    }

    /// `caption` in `template`, with the trigger where it is missing, prefix and suffix.
    fn finished(&self, front: Front, caption: &str, template: &str) -> String {
        let text = template.replace(CAPTION, caption);
        let text = front.trigger.map_or_else(|| text.clone(), |word| text.replace(TRIGGER, word));
        let triggered = match front.trigger {
            Some(word) if text.is_empty() => word.to_owned(),
            Some(word) if !has_trigger(&text, word) => format!("{word}, {text}"),
            _ => text,
        };
        format!("{}{triggered}{}", front.prefix, self.suffix)
    }
}

/// Whether `text` has the trigger `word` in it, in any case.
pub fn has_trigger(text: &str, word: &str) -> bool {
    text.to_lowercase().contains(&word.to_lowercase())
}

/// `text` with `class` in the place of the trigger `word`, wherever that stands, in any case.
///
/// ```
/// assert_eq!(data::with_class("Sks, a sks hat", "sks", "a man"), "a man, a a man hat");
/// ```
pub fn with_class(text: &str, word: &str, class: &str) -> String {
    let (length, lower) = (word.chars().count(), word.to_lowercase());
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let end = rest.char_indices().nth(length).map_or(rest.len(), |(end, _)| end);
        match length > 0 && rest[..end].to_lowercase() == lower {
            true => {
                replaced.push_str(class);
                rest = &rest[end..];
            }
            false => {
                replaced.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    replaced
}

/// `text` with each of `words` replaced, where it is not part of a longer word. All at once: what was put in is not replaced
/// again, and of words that begin at one place the longest counts.
fn replace_words(text: &str, words: &BTreeMap<String, String>) -> String {
    if words.is_empty() {
        return text.to_owned();
    }
    let is_letter = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let is_inside =
            |word: &str| is_letter(character_before(text, rest)) && is_letter(word.chars().next());
        let ends_inside =
            |word: &str| is_letter(word.chars().next_back()) && is_letter(rest[word.len()..].chars().next());
        let fits = |word: &&String| rest.starts_with(word.as_str()) && !is_inside(word) && !ends_inside(word);
        match words.keys().filter(fits).max_by_key(|word| word.len()) {
            Some(word) => {
                replaced.push_str(&words[word]);
                rest = &rest[word.len()..];
            }
            None => {
                replaced.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    replaced
}

/// The character of `text` in front of its end `rest`.
fn character_before(text: &str, rest: &str) -> Option<char> {
    text[..text.len() - rest.len()].chars().next_back()
}

/// A seed from texts (64-bit FNV-1a, with a byte between them that UTF-8 does not have).
fn seed_of(texts: &[&str]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Reads the name of a source, or a table.
pub(crate) fn name_or_table<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<CaptionRules, D::Error> {
    struct Rules;
    impl<'de> de::Visitor<'de> for Rules {
        type Value = CaptionRules;

        fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
            formatter.write_str("\"auto\", \"txt\" or \"metadata\", or a table of rules for captions")
        }

        fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<CaptionRules, E> {
            let source = CaptionSource::deserialize(StrDeserializer::new(name))?;
            Ok(CaptionRules { source, ..CaptionRules::default() })
        }

        fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> std::result::Result<CaptionRules, A::Error> {
            CaptionRules::deserialize(MapAccessDeserializer::new(table))
        }
    }
    deserializer.deserialize_any(Rules)
}

/// Writes the name of the source where nothing else is set, as plans always had it; else the table.
pub(crate) fn as_name_or_table<S: Serializer>(
    rules: &CaptionRules,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match *rules == (CaptionRules { source: rules.source, ..CaptionRules::default() }) {
        true => rules.source.serialize(serializer),
        false => rules.serialize(serializer),
    }
}

/// [`name_or_table`] of what may be absent.
pub(crate) fn some_name_or_table<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<CaptionRules>, D::Error> {
    name_or_table(deserializer).map(Some)
}

/// [`as_name_or_table`] of what may be absent.
pub(crate) fn as_some_name_or_table<S: Serializer>(
    rules: &Option<CaptionRules>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match rules {
        Some(rules) => as_name_or_table(rules, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::replace_words;

    #[test]
    fn whole_words_are_replaced_once_and_longer_ones_first() {
        let words = [("man", "sks man"), ("a man", "sks"), ("sks", "no"), ("…", ".")];
        let words = words.map(|(from, to)| (from.to_owned(), to.to_owned())).into();
        assert_eq!(
            replace_words("a man, mankind, woman, man… über man", &words),
            "sks, mankind, woman, sks man. über sks man"
        );
        assert_eq!(replace_words("", &words), "");
    }
}
