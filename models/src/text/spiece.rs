//! A SentencePiece model file (`spiece.model`) as a tokenizer: for checkpoints without a `tokenizer.json`.
//!
//! Only what UMT5 uses is read: unigram pieces with scores, a compiled character map, spaces turned into U+2581 with one
//! in front, runs of spaces made one. T5's sentinels (`<extra_id_0>` and on), which transformers adds on its own, stay
//! text. Source: `sentencepiece_model.proto` of google/sentencepiece, and what transformers makes
//! of such a file for T5.

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NormalizerWrapper, Precompiled, Replace, Sequence};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer};

/// Represents a space.
const SPACE: char = '\u{2581}';
/// `ModelType::UNIGRAM`, the default.
const UNIGRAM: u64 = 1;
/// `Type::NORMAL` and `Type::BYTE` of a piece; others are special tokens, which text is never split into.
const PLAIN: [u64; 2] = [1, 6];

/// Reads the bytes of a `spiece.model`.
///
/// # Errors
/// A message, if the bytes are not such a file, or the model is of another kind.
pub(super) fn tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    let model = Model::read(bytes).ok_or("the bytes are not a SentencePiece model")?;
    if model.kind != UNIGRAM {
        return Err(format!("it is a SentencePiece model of kind {}, not unigram", model.kind));
    }
    let say = |error: tokenizers::Error| error.to_string();
    let special: Vec<AddedToken> =
        model.special.iter().map(|piece| AddedToken::from(piece.clone(), true)).collect();
    let unigram =
        Unigram::from(model.pieces, Some(model.unknown), model.byte_fallback).map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::new(unigram);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.map.is_empty() {
        normalizers.push(Precompiled::from(&model.map).map_err(|error| error.to_string())?.into());
    }
    let spaces = Replace::new(ReplacePattern::Regex(" {2,}".to_owned()), " ").map_err(say)?;
    normalizers.push(spaces.into());
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(say)?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new(SPACE, PrependScheme::Always, true)));
    tokenizer.add_special_tokens(special).map_err(say)?;
    Ok(tokenizer)
}

/// What is used of the file.
#[derive(Default)]
struct Model {
    pieces: Vec<(String, f64)>,
    special: Vec<String>,
    kind: u64,
    unknown: usize,
    byte_fallback: bool,
    map: Vec<u8>,
}

impl Model {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut model = Self { kind: UNIGRAM, ..Self::default() };
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.piece(piece)?,
                (2, Value::Bytes(trainer)) => model.trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        if let (2, Value::Bytes(map)) = field? {
                            model.map = map.to_vec();
                        }
                    }
                }
                _ => {}
            }
        }
        (!model.pieces.is_empty()).then_some(model)
    }

    /// `SentencePiece`.
    fn piece(&mut self, bytes: &[u8]) -> Option<()> {
        let (mut text, mut score, mut kind) = (String::new(), 0.0, PLAIN[0]);
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => text = String::from_utf8(piece.to_vec()).ok()?,
                (2, Value::Four(word)) => score = f64::from(f32::from_le_bytes(word)),
                (3, Value::Number(number)) => kind = number,
                _ => {}
            }
        }
        if !PLAIN.contains(&kind) {
            self.special.push(text.clone());
        }
        self.pieces.push((text, score));
        Some(())
    }

    /// `TrainerSpec`.
    fn trainer(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Fields(bytes) {
            match field? {
                (3, Value::Number(kind)) => self.kind = kind,
                (35, Value::Number(is_on)) => self.byte_fallback = is_on != 0,
                (40, Value::Number(id)) => self.unknown = usize::try_from(id).ok()?,
                _ => {}
            }
        }
        Some(())
    }
}

/// A value in Protocol Buffers' wire format.
enum Value<'a> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

/// The fields of a message, each with its number; `None` where the bytes are damaged, which ends it.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Value::Number(self.number()?),
            1 => {
                self.take(8)?;
                Value::Eight
            }
            2 => {
                let length = usize::try_from(self.number()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Four(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}
