//! The texts that clips are trained with, and what is odd about them.

use std::collections::BTreeMap;

use data::{Dataset, has_trigger};
use serde::Serialize;

use crate::base::BaseModel;
use crate::error::Result;
use crate::plan::{LongText, long_texts};

/// A clip and its texts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClipTexts {
    /// Its name.
    pub id: String,
    /// How many samples of an epoch it has: its windows, each as often as it repeats; 0 where it is held out.
    pub samples: u64,
    /// The caption, of which the held-out loss is measured.
    pub caption: String,
    /// The texts of which one is drawn for each sample, with the share of the samples that each gets.
    pub texts: Vec<(String, f64)>,
}

/// What is odd about the texts of a dataset. Each list has the names of clips.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Findings {
    /// Without a text, or with an empty one among theirs.
    pub empty: Vec<String>,
    /// A caption, and the clips that share it.
    pub identical: BTreeMap<String, Vec<String>>,
    /// With a text of more tokens than the model sees; nothing where there is no tokenizer.
    pub long: Option<Vec<LongText>>,
    /// With the trigger in their captions as they were found, so that it was not put in front.
    pub with_trigger: Vec<String>,
    /// With some of the trigger's words in their captions, but not the trigger.
    pub with_words_of_trigger: Vec<String>,
}

/// The texts of each clip of `dataset`.
pub fn texts(dataset: &Dataset) -> Vec<ClipTexts> {
    let mut windows = vec![0u64; dataset.sources.len()];
    dataset.windows.iter().for_each(|window| windows[window.source] += 1);
    let of = |(source, windows): (&data::Source, u64)| {
        let item = &source.item;
        let drawn =
            if item.variants.is_empty() { std::slice::from_ref(&item.caption) } else { &item.variants };
        let mut texts: Vec<(String, f64)> = Vec::new();
        for text in drawn {
            match texts.iter_mut().find(|(known, _)| known == text) {
                Some((_, share)) => *share += 1.0 / drawn.len() as f64,
                None => texts.push((text.clone(), 1.0 / drawn.len() as f64)),
            }
        }
        let samples = if item.held_out { 0 } else { windows * u64::from(item.repeats) };
        ClipTexts { id: item.id.clone(), samples, caption: item.caption.clone(), texts }
    };
    dataset.sources.iter().zip(windows).map(of).collect()
}

/// What is odd about the texts of `dataset`, with this `trigger`.
///
/// # Errors
/// A tokenizer that cannot be read.
pub fn findings(dataset: &Dataset, trigger: Option<&str>, model: &BaseModel) -> Result<Findings> {
    let items = || dataset.sources.iter().map(|source| &source.item);
    let names = |is_one: &dyn Fn(&data::Item) -> bool| -> Vec<String> {
        items().filter(|item| is_one(item)).map(|item| item.id.clone()).collect()
    };
    let mut identical: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for item in items() {
        identical.entry(item.caption.clone()).or_default().push(item.id.clone());
    }
    identical.retain(|_, clips| clips.len() > 1);
    let has_own = |item: &data::Item, word: &str| item.found.iter().any(|text| has_trigger(text, word));
    let has_words = |item: &data::Item, word: &str| {
        let text = item.found.join(" ").to_lowercase();
        let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).collect();
        word.to_lowercase().split_whitespace().any(|part| words.contains(&part))
    };
    Ok(Findings {
        empty: names(&|item| item.texts().any(|text| text.trim().is_empty())),
        identical,
        long: model.tokenizer.exists().then(|| long_texts(dataset, model)).transpose()?,
        with_trigger: trigger.map_or_else(Vec::new, |word| names(&|item| has_own(item, word))),
        with_words_of_trigger: trigger
            .map_or_else(Vec::new, |word| names(&|item| has_words(item, word) && !has_own(item, word))),
    })
}
