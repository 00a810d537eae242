//! What may be wrong with clips before a night is spent on them: black or frozen ones, cuts inside a clip, repeated frames, bars at
//! the edges, small sources, and clips that are nearly the same. Nothing is changed: what to do
//! is the user's choice (`data.skip`, `data.crop_bars`, `data.split_cuts`).

use serde::Serialize;

use crate::bucket::Bucket;
use crate::crop::Crop;
use crate::dataset::Dataset;
use crate::decode;
use crate::error::Result;
use crate::look::Look;
use crate::media::Media;
use crate::picture::Picture;

/// Bits of 64 in which the hashes of two clips differ at most where they are nearly the same.
const TWINS: f64 = 6.0;

/// A clip with what was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// Its name.
    pub id: String,
    /// What may be wrong.
    pub findings: Vec<Finding>,
    /// Some of its frames, small.
    pub shown: Vec<Picture>,
    /// A difference hash of each of these; empty for a clip that is black.
    hashes: Vec<u64>,
}

/// What may be wrong with a clip.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub enum Finding {
    /// This share of its frames is black.
    Black {
        /// 0 to 1.
        share: f64,
    },
    /// Nothing moves.
    Frozen,
    /// This share of its frames repeats the one before: it was made at a lower rate than it says, or was slowed down.
    Repeated {
        /// 0 to 1.
        share: f64,
    },
    /// The scene changes.
    Cuts {
        /// When, in seconds.
        seconds: Vec<f64>,
    },
    /// Black bars, in pixels.
    Bars {
        /// On the left.
        left: u32,
        /// On the right.
        right: u32,
        /// Above.
        top: u32,
        /// Below.
        bottom: u32,
    },
    /// It is smaller than it is trained.
    Enlarged {
        /// By which factor it is enlarged.
        factor: f64,
    },
    /// Another clip is nearly the same.
    Twin {
        /// The other one.
        of: String,
    },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Black { share } => write!(f, "{:.0} % of its frames are black", 100.0 * share),
            Self::Frozen => f.write_str("nothing moves: it is a still"),
            Self::Repeated { share } => write!(
                f,
                "{:.0} % of its frames repeat the one before: data.source_fps is for clips whose rate is wrong",
                100.0 * share
            ),
            Self::Cuts { seconds } => {
                let times: Vec<String> = seconds.iter().map(|time| format!("{time:.2} s")).collect();
                write!(f, "the scene changes at {}: data.split_cuts = true splits it there", times.join(", "))
            }
            Self::Bars { left, right, top, bottom } => {
                let bars = Crop { left: *left, right: *right, top: *top, bottom: *bottom };
                write!(f, "black bars ({bars}, in pixels): data.crop_bars = true cuts them off")
            }
            Self::Enlarged { factor } => write!(f, "smaller than it is trained: enlarged {factor:.2} times"),
            Self::Twin { of } => write!(f, "nearly the same as {of}"),
        }
    }
}

/// Reads all clips of `dataset` and says what may be wrong with each. `begin` is called before each, and may end it all.
///
/// # Errors
/// A clip that cannot be decoded, and what `begin` says.
pub fn check(dataset: &Dataset, begin: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Checked>> {
    let mut all: Vec<Checked> = Vec::new();
    for (index, source) in dataset.sources.iter().enumerate() {
        begin()?;
        let media = &source.item.media;
        let own = source.own_frames();
        let mut look = Look::new(own.len());
        for (number, frame) in decode::frames(media, &source.probe)?.enumerate().take(own.end) {
            let frame = frame?;
            if number >= own.start {
                look.at(&source.crop.of(frame));
            }
        }
        let mut findings = found(&look, matches!(media, Media::Still(_)));
        let (shown, hashes) = look.pictures();
        let buckets =
            dataset.windows.iter().filter(|window| window.source == index).map(|window| window.bucket);
        let factor = buckets.map(|bucket| enlarged(source.displayed(), bucket)).fold(0.0, f64::max);
        if factor > 1.0 {
            findings.push(Finding::Enlarged { factor });
        }
        let twin = all.iter().find(|other| are_twins(&other.hashes, &hashes));
        findings.extend(twin.map(|other| Finding::Twin { of: other.id.clone() }));
        all.push(Checked { id: source.item.id.clone(), findings, shown, hashes });
    }
    Ok(all)
}

/// How many times a clip of this size is enlarged to cover `bucket`.
fn enlarged((width, height): (u32, u32), bucket: Bucket) -> f64 {
    let along = |to: u32, from: u32| f64::from(to) / f64::from(from);
    along(bucket.width, width).max(along(bucket.height, height))
}

fn are_twins(a: &[u64], b: &[u64]) -> bool {
    let apart: u32 = a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum();
    !a.is_empty() && a.len() == b.len() && f64::from(apart) / a.len() as f64 <= TWINS
}

/// What may be wrong with a clip by itself.
fn found(look: &Look, is_still: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let black = look.black();
    if black > 0.0 {
        findings.push(Finding::Black { share: black });
    }
    match look.repeated().filter(|_| !is_still) {
        Some(share) if share > 0.95 => findings.push(Finding::Frozen),
        Some(share) if share > 0.2 => findings.push(Finding::Repeated { share }),
        _ => {}
    }
    let seconds: Vec<f64> = look.cuts().into_iter().map(|(_, time)| time).collect();
    if !seconds.is_empty() {
        findings.push(Finding::Cuts { seconds });
    }
    let bars = look.bars();
    if !bars.is_none() {
        let Crop { left, right, top, bottom } = bars;
        findings.push(Finding::Bars { left, right, top, bottom });
    }
    findings
}
