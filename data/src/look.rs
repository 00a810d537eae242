//! What all frames of a clip show: which are black, what repeats, where the scene changes, and bars at the edges.

use crate::crop::Crop;
use crate::decode::Frame;
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

/// What is seen of a clip, frame by frame.
pub(crate) struct Look {
    /// Frames that the clip has.
    count: usize,
    seen: usize,
    /// Frames that are black.
    black: usize,
    changes: Vec<Change>,
    /// The last frame, unless that was black.
    last: Option<Vec<u8>>,
    /// The brightest pixel of each row and of each column over all frames.
    rows: Vec<u8>,
    columns: Vec<u8>,
    shown: Vec<Picture>,
    hashes: Vec<u64>,
}

/// A frame that follows another, neither of them black.
struct Change {
    /// Its number.
    frame: usize,
    /// When it appears, in seconds.
    time: f64,
    /// Mean change of grey.
    grey: f64,
}

impl Look {
    /// At a clip of `count` frames.
    pub fn new(count: usize) -> Self {
        let (changes, rows, columns) = (Vec::new(), Vec::new(), Vec::new());
        let (shown, hashes) = (Vec::new(), Vec::new());
        Self { count, seen: 0, black: 0, changes, last: None, rows, columns, shown, hashes }
    }

    /// Looks at the next frame.
    pub fn at(&mut self, frame: &Frame) {
        self.edges(frame);
        let number = self.seen;
        self.seen += 1;
        let Some(picture) = Picture::new(frame.width, frame.height, frame.rgb.clone()) else { return };
        let Some(small) = picture.stretched(SIDE, SIDE) else { return };
        let grey = small.grey();
        let is_black = mean(grey.iter().map(|value| f64::from(*value))) < BLACK;
        self.black += usize::from(is_black);
        if let (Some(last), false) = (&self.last, is_black) {
            let change = mean(last.iter().zip(&grey).map(|(a, b)| f64::from(a.abs_diff(*b))));
            self.changes.push(Change { frame: number, time: frame.time, grey: change });
        }
        self.last = (!is_black).then_some(grey);
        // In the middle of each of equal parts of the clip.
        let is_shown = (0..SHOWN).any(|part| number == (2 * part + 1) * self.count / (2 * SHOWN));
        if is_shown {
            let height = (SHOWN_WIDTH * frame.height).div_ceil(frame.width).max(1);
            self.shown.extend(picture.stretched(SHOWN_WIDTH, height));
            self.hashes.extend(picture.stretched(9, 8).map(|tiny| difference_hash(&tiny.grey())));
        }
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

    /// The share of the frames that are black.
    pub fn black(&self) -> f64 {
        self.black as f64 / self.seen.max(1) as f64
    }

    /// The share of the frames that repeat the one before; nothing where none follows another.
    pub fn repeated(&self) -> Option<f64> {
        let same = self.changes.iter().filter(|change| change.grey < SAME).count();
        (!self.changes.is_empty()).then(|| same as f64 / self.changes.len() as f64)
    }

    /// The frames that begin another scene, each with its time in seconds.
    pub fn cuts(&self) -> Vec<(usize, f64)> {
        // Of a clip whose frames repeat, those that do not.
        let moving = self.changes.iter().map(|change| change.grey).filter(|grey| *grey >= SAME);
        let mut sorted: Vec<f64> = moving.collect();
        sorted.sort_by(f64::total_cmp);
        let usual = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        let is_cut = |change: &&Change| change.grey > CUT.0 && change.grey > CUT.1 * usual;
        self.changes.iter().filter(is_cut).map(|change| (change.frame, change.time)).collect()
    }

    /// Black bars at the edges; none of a clip that is all black.
    pub fn bars(&self) -> Crop {
        if self.black == self.seen {
            return Crop::NONE;
        }
        let dark = |values: &mut dyn Iterator<Item = &u8>| values.take_while(|value| **value <= BAR).count();
        let wide = |bar: usize, side: usize| match bar as f64 >= LEAST_BAR * side as f64 && bar > 1 {
            true => bar as u32,
            false => 0,
        };
        let (rows, columns) = (&self.rows, &self.columns);
        let [top, bottom] =
            [dark(&mut rows.iter()), dark(&mut rows.iter().rev())].map(|bar| wide(bar, rows.len()));
        let [left, right] =
            [dark(&mut columns.iter()), dark(&mut columns.iter().rev())].map(|bar| wide(bar, columns.len()));
        Crop { left, right, top, bottom }
    }

    /// Some of its frames, small, and a difference hash of each; no hashes of a clip that is all black.
    pub fn pictures(self) -> (Vec<Picture>, Vec<u64>) {
        let is_seen = self.black < self.seen;
        (self.shown, if is_seen { self.hashes } else { Vec::new() })
    }
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
