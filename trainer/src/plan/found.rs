//! What the data came to, and an identity of it.

use std::collections::BTreeSet;
use std::path::Path;

use data::Dataset;
use models::text::{MAX_TOKENS, Tokenizer, clean};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::DatasetPlan;
use crate::base::BaseModel;
use crate::bounds;
use crate::bytes::hex;
use crate::encode::LatentStore;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::recipe::TrainConfig;

/// What `dataset` came to.
///
/// # Errors
/// [`Error::NothingToTrainOn`].
pub(super) fn summary(dataset: &Dataset) -> Result<DatasetPlan> {
    let held_out = |source: usize| dataset.sources[source].item.held_out;
    let repeats = dataset.windows.iter().map(|w| u64::from(dataset.sources[w.source].item.repeats));
    bounds::at_most("data.repeats: items of an epoch", repeats.sum(), bounds::EPOCH)?;
    let held = dataset.windows.iter().filter(|w| held_out(w.source)).count();
    if dataset.windows.len() == held {
        return Err(Error::NothingToTrainOn);
    }
    Ok(DatasetPlan {
        clips: dataset.sources.len(),
        items: dataset.windows.len() - held,
        held_out: held,
        skipped: dataset.skipped.clone(),
        digest: digest(dataset),
    })
}

/// Texts with their lengths in front and numbers of eight bytes, so that nothing but their values counts.
fn digest(dataset: &Dataset) -> String {
    let mut hash = Sha256::new();
    hash.update(b"dataset 2");
    for window in &dataset.windows {
        let source = &dataset.sources[window.source];
        for text in [&source.item.id, &source.item.caption] {
            hash_text(&mut hash, text);
        }
        // Clips of a single text have the digest that they always had.
        source.item.variants.iter().for_each(|text| hash_text(&mut hash, text));
        if !source.crop.is_none() {
            hash_text(&mut hash, &format!("without {}", source.crop));
        }
        let (bucket, aspect) = (window.bucket, source.probe.pixel_aspect);
        let shape = [bucket.width, bucket.height, bucket.frames, aspect.width, aspect.height];
        let frames = dataset.source_frames(window);
        let numbers = shape.map(u64::from).into_iter().chain([
            window.start as u64,
            u64::from(source.item.repeats),
            u64::from(source.item.held_out),
            frames.len() as u64,
        ]);
        for number in numbers.chain(frames.iter().map(|&frame| frame as u64)) {
            hash.update(number.to_le_bytes());
        }
    }
    hex(&hash.finalize())
}

fn hash_text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

/// The digest of versions that hashed Rust's debug text, so that their runs can be resumed. `None` where a clip has pixels
/// that are not square, which those versions took for square ones: their runs saw other clips.
pub(super) fn former_digest(dataset: &Dataset) -> Option<String> {
    let mut hash = Sha256::new();
    for window in &dataset.windows {
        let source = &dataset.sources[window.source];
        if !source.probe.pixel_aspect.is_square() || !source.crop.is_none() {
            return None;
        }
        let item = &source.item;
        let line = (&item.id, &item.caption, window.bucket, window.start, item.repeats, item.held_out);
        hash.update(format!("{line:?}\n"));
        hash.update(format!("{:?}\n", dataset.source_frames(window)));
    }
    Some(hex(&hash.finalize()))
}

/// The texts that clips are trained with, as the cache holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TextsToEncode {
    /// How many there are, equal ones once.
    pub count: usize,
    /// Bytes of their entries at most: a token is taken to be one letter, of `text_dim` numbers.
    pub bytes: u64,
}

/// The texts of `dataset` and those that `train` has besides, for a network that reads `text_dim` numbers of each token, of `size` bytes each.
pub fn texts_to_encode(
    (dataset, train): (&Dataset, &TrainConfig),
    (text_dim, size): (usize, usize),
) -> TextsToEncode {
    let others = train.texts(dataset);
    let captions = dataset.sources.iter().flat_map(|source| source.item.texts());
    let texts: BTreeSet<&str> = captions.chain(others.iter().map(String::as_str)).collect();
    let tokens = |text: &str| (text.chars().count() + 2).min(MAX_TOKENS);
    let all: usize = texts.iter().map(|text| tokens(text)).sum();
    TextsToEncode { count: texts.len(), bytes: (all * text_dim * size) as u64 }
}

/// A text that clips are trained with, of which the model sees the beginning alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LongText {
    /// The clip.
    pub id: String,
    /// How many tokens it has.
    pub tokens: usize,
}

/// The clips with texts of more tokens than the model sees, each with its longest.
///
/// # Errors
/// A tokenizer that cannot be read.
pub fn long_texts(dataset: &Dataset, model: &BaseModel) -> Result<Vec<LongText>> {
    let items = || dataset.sources.iter().map(|source| &source.item);
    // A token is at least a letter, but for the two at the ends.
    let may_be_long = |text: &str| text.chars().count() + 2 > MAX_TOKENS;
    if !items().any(|item| item.texts().any(may_be_long)) {
        return Ok(Vec::new());
    }
    let tokenizer = Tokenizer::load(&model.tokenizer)?;
    let mut long = Vec::new();
    for item in items() {
        let mut tokens = 0;
        for text in item.texts().filter(|text| may_be_long(text)) {
            tokens = tokenizer.count(&clean(text))?.max(tokens);
        }
        if tokens > MAX_TOKENS {
            long.push(LongText { id: item.id.clone(), tokens });
        }
    }
    Ok(long)
}

/// A line about captions of which the model sees the beginning alone, if there are any.
///
/// # Errors
/// A tokenizer that cannot be read.
pub(super) fn long_captions(dataset: &Dataset, model: &BaseModel) -> Result<Option<String>> {
    let long = long_texts(dataset, model)?;
    let names: Vec<String> =
        long.iter().map(|text| format!("{} ({} tokens)", text.id, text.tokens)).collect();
    Ok((!long.is_empty()).then(|| {
        format!(
            "captions longer than the {MAX_TOKENS} tokens that the model sees, of which the rest is cut off: {}",
            names.join(", ")
        )
    }))
}

/// Whether the cache in `folder` has the states of all texts that a run of `train` over `dataset` with `clips` encodes by `model`.
///
/// # Errors
/// A cache that cannot be read.
pub(super) fn has_texts(
    folder: &Path,
    model: &BaseModel,
    (dataset, train): (&Dataset, &TrainConfig),
    clips: &[ClipRequest],
) -> Result<bool> {
    // To open one is to make its folder, and nothing is known of a model that is assumed.
    if !folder.is_dir() || !model.text_encoder.exists() {
        return Ok(false);
    }
    let others = train.texts(dataset);
    let captions = dataset.sources.iter().flat_map(|source| source.item.texts());
    let captions = captions.chain(others.iter().map(String::as_str));
    LatentStore::open(folder, model)?.has_prompts(captions.chain(clip_texts(clips)).chain([""]))
}

/// The texts of `clips`.
fn clip_texts(clips: &[ClipRequest]) -> impl Iterator<Item = &str> {
    clips.iter().flat_map(|clip| [clip.prompt.as_str(), clip.negative.as_str()])
}
