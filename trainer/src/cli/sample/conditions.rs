//! The conditions of `tandem sample` for control models.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::encode::conditions::given::{CameraPath, GivenConditions};

/// What control models (Fun, VACE, Animate, S2V) make clips from, besides prompt and picture.
#[derive(Debug, Default, Args)]
pub(super) struct ConditionOptions {
    /// The control clip of Fun-Control or VACE: pose, depth, edges, or a clip to edit; of Animate and S2V the pose clip. At least as long as the
    /// clip that is made.
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
    /// VACE's mask over the control clip, a clip or a picture: white is generated, black is kept. Of Animate: white is where the
    /// character is in the background.
    #[arg(long, value_name = "FILE", requires = "control")]
    mask: Option<PathBuf>,
    /// What VACE's hints are multiplied by, 0 to 10: below 1 the clip follows its control less.
    #[arg(long, value_name = "FACTOR")]
    hint_scale: Option<f64>,
    /// The face clip of Animate: square, the face alone in each frame.
    #[arg(long, value_name = "FILE", requires = "control")]
    faces: Option<PathBuf>,
    /// The clip that Animate puts the character into, with --mask; without both it moves the character in its own picture.
    #[arg(long, value_name = "FILE", requires = "mask")]
    background: Option<PathBuf>,
    /// A reference picture, of Fun-Control V1.1 and A14B, Animate and S2V one, of VACE any number; may be given more than once.
    #[arg(long, value_name = "FILE")]
    reference: Vec<PathBuf>,
    /// The camera path of Fun-Control-Camera: left, right, up, down, left-up, left-down, right-up, right-down, in, out, or a
    /// file with a line of 19 numbers for each frame.
    #[arg(long, value_name = "MOVE_OR_FILE")]
    camera: Option<String>,
    /// The speech of S2V: WAV, FLAC, MP3, M4A, AAC, Ogg Vorbis, or a video with an audio track. With --frames 0 the clip is as long as
    /// it; a clip of more than 77 frames is made in pieces, each of which continues the one before.
    #[arg(long, value_name = "FILE")]
    audio: Option<PathBuf>,
    /// Frames of a piece of a long clip: of S2V a multiple of 4, default 80; of Animate 4n+1, default 77.
    #[arg(long, value_name = "FRAMES")]
    piece_frames: Option<u32>,
}

impl ConditionOptions {
    /// Those that are given.
    pub fn given(&self) -> GivenConditions {
        GivenConditions {
            control: self.control.clone(),
            mask: self.mask.clone(),
            hint_scale: self.hint_scale,
            faces: self.faces.clone(),
            background: self.background.clone(),
            references: self.reference.clone(),
            camera: self.camera.as_deref().map(|text| CameraPath::parse(text, Path::new(""))),
            audio: self.audio.clone(),
            piece_frames: self.piece_frames,
        }
    }
}
