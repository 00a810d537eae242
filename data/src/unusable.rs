//! Clips that cannot be trained on: found one by one, refused or left out all at once.

use crate::config::Unfit;
use crate::error::{DataError, Result};

/// A clip that cannot be trained on.
#[derive(Debug)]
pub(crate) struct Unusable {
    /// Its id.
    pub id: String,
    /// What is wrong with it.
    pub why: Why,
}

/// What is wrong with a clip.
#[derive(Debug)]
pub(crate) enum Why {
    /// There is no caption.
    NoCaption,
    /// Its caption is empty.
    EmptyCaption,
    /// It is shorter than every length: frames at the target rate, and the shortest length.
    TooShort {
        /// Frames at the target rate.
        frames: usize,
        /// Frames of the shortest bucket.
        shortest: u32,
    },
    /// Its file or its caption cannot be read.
    Fault(DataError),
}

impl Why {
    fn in_words(&self) -> String {
        match self {
            Self::NoCaption => "it has no caption".to_owned(),
            Self::EmptyCaption => "its caption is empty".to_owned(),
            Self::TooShort { frames, shortest } => {
                format!("it has {} where the shortest bucket takes {shortest}", counted(*frames))
            }
            Self::Fault(DataError::Unreadable { reason, .. }) => reason.clone(),
            Self::Fault(DataError::NoDecoder { codec, .. }) => {
                format!("it holds {codec}, which needs the ffmpeg program, and none was found on PATH")
            }
            Self::Fault(error) => error.to_string(),
        }
    }
}

/// Refuses `unusable`, or gives a line for each where they are to be left out. `way_out` is what to do about captions that
/// are not there, `fps` the target rate.
///
/// # Errors
/// All of them in one error. A single fault is its own error.
pub(crate) fn settle(
    mut unusable: Vec<Unusable>,
    unfit: Unfit,
    way_out: &'static str,
    fps: f64,
) -> Result<Vec<String>> {
    unusable.sort_by(|a, b| a.id.cmp(&b.id));
    if unfit == Unfit::Skip {
        return Ok(unusable.iter().map(|clip| format!("{}: {}", clip.id, clip.why.in_words())).collect());
    }
    let shortest = unusable.iter().filter_map(|clip| match clip.why {
        Why::TooShort { shortest, .. } => Some(shortest),
        _ => None,
    });
    let shortest = shortest.min().unwrap_or(1);
    let is_caption = |clip: &Unusable| matches!(clip.why, Why::NoCaption | Why::EmptyCaption);
    let is_short = |clip: &Unusable| matches!(clip.why, Why::TooShort { .. });
    if unusable.is_empty() {
        return Ok(Vec::new());
    }
    if unusable.len() == 1 && !is_caption(&unusable[0]) && !is_short(&unusable[0]) {
        return match unusable.remove(0).why {
            Why::Fault(error) => Err(error),
            _ => Ok(Vec::new()), // the other kinds were excluded above
        };
    }
    if unusable.iter().all(is_caption) {
        let named = |clip: &Unusable| match clip.why {
            Why::EmptyCaption => format!("{} (its caption is empty)", clip.id),
            _ => clip.id.clone(),
        };
        return Err(DataError::NoCaption { files: unusable.iter().map(named).collect(), way_out });
    }
    if unusable.iter().all(is_short) {
        let named = |clip: &Unusable| match clip.why {
            Why::TooShort { frames, .. } => format!("{} ({})", clip.id, counted(frames)),
            _ => clip.id.clone(),
        };
        let clips = unusable.iter().map(named).collect();
        return Err(DataError::TooShort { clips, shortest, fps });
    }
    let clips = unusable.iter().map(|clip| format!("{}: {}", clip.id, clip.why.in_words())).collect();
    Err(DataError::Unusable { clips })
}

fn counted(frames: usize) -> String {
    if frames == 1 { "1 frame".to_owned() } else { format!("{frames} frames") }
}
