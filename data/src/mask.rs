//! Masks that are made by rule: which pixels of a clip a model is to generate, the same for the same clip every time.

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Boxes of a mask at most.
const BOXES: u64 = 3;
/// Bends of a stroke.
const BENDS: u64 = 6;

/// How a mask is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MaskRule {
    /// One to three boxes, each a fifth to three fifths of the picture wide and high, are generated.
    Boxes,
    /// A broad stroke with bends is generated.
    Brush,
    /// All outside of a box that is half to nine tenths of the picture wide and high is generated.
    Outpaint,
    /// All but the first frame is generated.
    First,
    /// All but the last frame.
    Last,
    /// All but the first and the last frame.
    FirstLast,
    /// All but every n-th frame, from the first on.
    Every(u32),
}

impl TryFrom<String> for MaskRule {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let every =
            || name.strip_prefix("every-").and_then(|n| n.parse().ok()).filter(|n| (2..=1000).contains(n));
        Ok(match name.as_str() {
            "boxes" => Self::Boxes,
            "brush" => Self::Brush,
            "outpaint" => Self::Outpaint,
            "first" => Self::First,
            "last" => Self::Last,
            "first-last" => Self::FirstLast,
            _ => match every() {
                Some(frames) => Self::Every(frames),
                None => {
                    return Err(format!(
                        "\"{name}\" is no rule for masks: boxes, brush, outpaint, first, last, first-last, or every-4 (2 to \
                         1000)"
                    ));
                }
            },
        })
    }
}

impl From<MaskRule> for String {
    fn from(rule: MaskRule) -> Self {
        rule.to_string()
    }
}

impl std::fmt::Display for MaskRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Boxes => f.write_str("boxes"),
            Self::Brush => f.write_str("brush"),
            Self::Outpaint => f.write_str("outpaint"),
            Self::First => f.write_str("first"),
            Self::Last => f.write_str("last"),
            Self::FirstLast => f.write_str("first-last"),
            Self::Every(frames) => write!(f, "every-{frames}"),
        }
    }
}

impl MaskRule {
    /// The mask `[frames, height, width]` of a clip of this size: 1 where it is generated, else 0. It is a function of `seed`.
    pub fn mask(self, [frames, height, width]: [usize; 3], seed: u64) -> Vec<f32> {
        let by_frame = |is_given: &dyn Fn(usize) -> bool| -> Vec<f32> {
            let value = |frame: usize| if is_given(frame) { 0.0 } else { 1.0 };
            (0..frames).flat_map(|frame| std::iter::repeat_n(value(frame), width * height)).collect()
        };
        let mut random = Random::new(seed, 0);
        let plane = match self {
            Self::First => return by_frame(&|frame| frame == 0),
            Self::Last => return by_frame(&|frame| frame + 1 == frames),
            Self::FirstLast => return by_frame(&|frame| frame == 0 || frame + 1 == frames),
            Self::Every(nth) => return by_frame(&|frame| frame.is_multiple_of(nth as usize)),
            Self::Boxes => boxes(&mut random, (width, height)),
            Self::Brush => brush(&mut random, (width, height)),
            Self::Outpaint => {
                let mut plane = vec![1.0; width * height];
                fill(&mut plane, width, a_box(&mut random, (width, height), (5, 9)), 0.0);
                plane
            }
        };
        plane.repeat(frames)
    }
}

/// Left, top, right and bottom of a box of so many tenths of the picture, `from` to `to`, anywhere in it.
fn a_box(random: &mut Random, (width, height): (usize, usize), (from, to): (u64, u64)) -> [usize; 4] {
    let mut along = |length: usize| {
        let tenths = from + random.below(to - from + 1);
        let side = (length * tenths as usize / 10).max(1);
        let start = random.below((length - side) as u64 + 1) as usize;
        (start, start + side)
    };
    let ((left, right), (top, bottom)) = (along(width), along(height));
    [left, top, right, bottom]
}

fn fill(plane: &mut [f32], width: usize, [left, top, right, bottom]: [usize; 4], value: f32) {
    for row in plane.chunks_exact_mut(width).take(bottom).skip(top) {
        row[left..right].fill(value);
    }
}

fn boxes(random: &mut Random, (width, height): (usize, usize)) -> Vec<f32> {
    let mut plane = vec![0.0; width * height];
    for _ in 0..=random.below(BOXES) {
        fill(&mut plane, width, a_box(random, (width, height), (2, 6)), 1.0);
    }
    plane
}

/// A stroke of an eighth of the shorter side from one place to the next.
fn brush(random: &mut Random, (width, height): (usize, usize)) -> Vec<f32> {
    let mut place = || (random.below(width as u64) as f32, random.below(height as u64) as f32);
    let places: Vec<(f32, f32)> = (0..=BENDS).map(|_| place()).collect();
    let radius = (width.min(height) as f32 / 16.0).max(1.0);
    let is_near = |x: f32, y: f32| {
        places.windows(2).any(|ends| {
            let ((ax, ay), (bx, by)) = (ends[0], ends[1]);
            let (dx, dy) = (bx - ax, by - ay);
            let length = dx * dx + dy * dy;
            let along =
                if length > 0.0 { (((x - ax) * dx + (y - ay) * dy) / length).clamp(0.0, 1.0) } else { 0.0 };
            let (gap_x, gap_y) = (x - ax - along * dx, y - ay - along * dy);
            gap_x * gap_x + gap_y * gap_y <= radius * radius
        })
    };
    let value = |index: usize| f32::from(u8::from(is_near((index % width) as f32, (index / width) as f32)));
    (0..width * height).map(value).collect()
}
