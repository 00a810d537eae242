//! What may be wrong with clips before a night is spent on them: black or frozen ones, cuts inside a clip, repeated frames, bars at
//! the edges, small sources, and clips that are nearly the same. Nothing is changed: what to do is the user's choice.

use serde::Serialize;

use crate::bucket::Bucket;
use crate::dataset::Dataset;
use crate::decode::{self, Frame};
use crate::error::Result;
use crate::media::Media;
use crate::picture::Picture;

/// Pictures of a clip that a report shows.
const SHOWN: usize = 4;
/// Their width in pixels.
const SHOWN_WIDTH: u32 = 160;
/// Side of the small grey pictures that frames are compared by.
const SIDE: u32 = 32;
/// Mean grey of 255 below which a frame is black.
const BLACK: f64 = 8.0;
/// Mean change of grey, of 255, below which a frame is that before it: coding alone changes more in what moves.
const SAME: f64 = 0.35;
/// Mean change of grey from which a cut is seen, and how many times the clip's usual change it must be.
const CUT: (f64, f64) = (24.0, 6.0);
/// Grey of 255 up to which an edge belongs to a bar: video's black is 16.
const BAR: u8 = 28;
/// Share of the side from which a bar is told.
const LEAST_BAR: f64 = 0.015;
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
                write!(f, "the scene changes at {}: split it there", times.join(", "))
            }
            Self::Bars { left, right, top, bottom } => {
                write!(
                    f,
                    "black bars of {top} pixels above, {bottom} below, {left} left, {right} right: crop them"
                )
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
        let mut look = Look::new(source.probe.times.len());
        for frame in decode::frames(media, &source.probe)? {
            look.at(&frame?);
        }
        let (mut findings, shown, hashes) = look.found(matches!(media, Media::Still(_)));
        let buckets =
            dataset.windows.iter().filter(|window| window.source == index).map(|window| window.bucket);
        let factor = buckets.map(|bucket| enlarged(source.probe.displayed(), bucket)).fold(0.0, f64::max);
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

/// What is seen of a clip, frame by frame.
struct Look {
    /// Frames that the clip has.
    count: usize,
    seen: usize,
    /// Frames that are black.
    black: usize,
    /// When each frame appears that follows another, neither of them black, and its mean change of grey.
    changes: Vec<(f64, f64)>,
    /// The last frame, unless that was black.
    last: Option<Vec<u8>>,
    /// The brightest pixel of each row and of each column over all frames.
    rows: Vec<u8>,
    columns: Vec<u8>,
    shown: Vec<Picture>,
    hashes: Vec<u64>,
}

impl Look {
    fn new(count: usize) -> Self {
        let (changes, rows, columns) = (Vec::new(), Vec::new(), Vec::new());
        let (shown, hashes) = (Vec::new(), Vec::new());
        Self { count, seen: 0, black: 0, changes, last: None, rows, columns, shown, hashes }
    }

    fn at(&mut self, frame: &Frame) {
        self.edges(frame);
        let Some(picture) = Picture::new(frame.width, frame.height, frame.rgb.clone()) else { return };
        let Some(small) = picture.stretched(SIDE, SIDE) else { return };
        let grey = small.grey();
        let is_black = mean(grey.iter().map(|value| f64::from(*value))) < BLACK;
        self.black += usize::from(is_black);
        if let (Some(last), false) = (&self.last, is_black) {
            let change = mean(last.iter().zip(&grey).map(|(a, b)| f64::from(a.abs_diff(*b))));
            self.changes.push((frame.time, change));
        }
        self.last = (!is_black).then_some(grey);
        // In the middle of each of equal parts of the clip.
        let is_shown = (0..SHOWN).any(|part| self.seen == (2 * part + 1) * self.count / (2 * SHOWN));
        if is_shown {
            let height = (SHOWN_WIDTH * frame.height).div_ceil(frame.width).max(1);
            self.shown.extend(picture.stretched(SHOWN_WIDTH, height));
            self.hashes.extend(picture.stretched(9, 8).map(|tiny| difference_hash(&tiny.grey())));
        }
        self.seen += 1;
    }

    fn edges(&mut self, frame: &Frame) {
        self.rows.resize(frame.height as usize, 0);
        self.columns.resize(frame.width as usize, 0);
        for (row, pixels) in self.rows.iter_mut().zip(frame.rgb.chunks_exact(3 * frame.width as usize)) {
            for (column, pixel) in self.columns.iter_mut().zip(pixels.chunks_exact(3)) {
                let value = pixel.iter().copied().max().unwrap_or(0);
                (*row, *column) = ((*row).max(value), (*column).max(value));
            }
        }
    }

    /// What was found, and the pictures with their hashes.
    fn found(self, is_still: bool) -> (Vec<Finding>, Vec<Picture>, Vec<u64>) {
        let mut findings = Vec::new();
        let black = self.black as f64 / self.seen.max(1) as f64;
        if black > 0.0 {
            findings.push(Finding::Black { share: black });
        }
        let same = self.changes.iter().filter(|(_, change)| *change < SAME).count();
        let repeated = same as f64 / self.changes.len().max(1) as f64;
        match is_still || self.changes.is_empty() {
            true => {}
            false if repeated > 0.95 => findings.push(Finding::Frozen),
            false if repeated > 0.2 => findings.push(Finding::Repeated { share: repeated }),
            false => {}
        }
        let cuts = self.cuts();
        if !cuts.is_empty() {
            findings.push(Finding::Cuts { seconds: cuts });
        }
        if black < 1.0 {
            findings.extend(bars(&self.rows, &self.columns));
        }
        let hashes = if black < 1.0 { self.hashes } else { Vec::new() };
        (findings, self.shown, hashes)
    }

    /// When the scene changes.
    fn cuts(&self) -> Vec<f64> {
        // Of a clip whose frames repeat, those that do not.
        let moving = self.changes.iter().map(|(_, change)| *change).filter(|change| *change >= SAME);
        let mut sorted: Vec<f64> = moving.collect();
        sorted.sort_by(f64::total_cmp);
        let usual = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        let is_cut = |change: f64| change > CUT.0 && change > CUT.1 * usual;
        self.changes.iter().filter(|(_, change)| is_cut(*change)).map(|(time, _)| *time).collect()
    }
}

fn bars(rows: &[u8], columns: &[u8]) -> Option<Finding> {
    let dark = |values: &mut dyn Iterator<Item = &u8>| values.take_while(|value| **value <= BAR).count();
    let wide = |bar: usize, side: usize| match bar as f64 >= LEAST_BAR * side as f64 && bar > 1 {
        true => bar as u32,
        false => 0,
    };
    let [top, bottom] =
        [dark(&mut rows.iter()), dark(&mut rows.iter().rev())].map(|bar| wide(bar, rows.len()));
    let [left, right] =
        [dark(&mut columns.iter()), dark(&mut columns.iter().rev())].map(|bar| wide(bar, columns.len()));
    ([left, right, top, bottom] != [0; 4]).then_some(Finding::Bars { left, right, top, bottom })
}

/// A bit for each pixel of 9 x 8 that is brighter than its right neighbour.
fn difference_hash(grey: &[u8]) -> u64 {
    let pairs = grey.chunks_exact(9).flat_map(|row| row.windows(2));
    pairs.fold(0, |hash, pair| hash << 1 | u64::from(pair[0] > pair[1]))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    sum / count.max(1) as f64
}
