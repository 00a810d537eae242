//! The conditions that a clip is asked for with.

use std::path::{Path, PathBuf};

use models::dit::{DitConfig, Pictures};
use models::published::{Beside, Kind};
use serde::{Deserialize, Serialize};

use super::camera::Move;
use crate::error::{Error, Result};

/// Files and names that a control model makes a clip from, besides prompt and start picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GivenConditions {
    /// The control clip.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// The mask, a clip or a picture: white is to be generated; of Animate it is where the character is. VACE and Animate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<PathBuf>,
    /// The face clip of Animate, square.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faces: Option<PathBuf>,
    /// The clip that Animate puts its character into, where `mask` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background: Option<PathBuf>,
    /// What VACE's hints are multiplied by: below 1 the clip follows its control less. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint_scale: Option<f64>,
    /// Reference pictures, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<PathBuf>,
    /// The camera path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub camera: Option<CameraPath>,
    /// The speech of S2V: an audio file, or a video with an audio track.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio: Option<PathBuf>,
    /// Frames of each piece that a long clip is made in: of S2V a multiple of 4, of which the first three of the first piece are dropped,
    /// default 80; of Animate 4n+1, of which a piece shares one with the piece before, default 77.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piece_frames: Option<u32>,
}

/// Where a camera path is from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CameraPath {
    /// A named move.
    Named(Move),
    /// A file of poses.
    File(PathBuf),
}

impl CameraPath {
    /// A named move, or else a file, looked for from the folder `from`.
    pub fn parse(text: &str, from: &Path) -> Self {
        match <Move as clap::ValueEnum>::from_str(text, true) {
            Ok(named) => Self::Named(named),
            Err(_) => Self::File(from.join(text)),
        }
    }
}

impl GivenConditions {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The same with what `other` has in place of its own.
    #[must_use]
    pub fn over(&self, other: Self) -> Self {
        Self {
            control: self.control.clone().or(other.control),
            mask: self.mask.clone().or(other.mask),
            faces: self.faces.clone().or(other.faces),
            hint_scale: self.hint_scale.or(other.hint_scale),
            background: self.background.clone().or(other.background),
            references: if self.references.is_empty() { other.references } else { self.references.clone() },
            camera: self.camera.clone().or(other.camera),
            audio: self.audio.clone().or(other.audio),
            piece_frames: self.piece_frames.or(other.piece_frames),
        }
    }

    /// Checks that they are those that `dit` reads; `has_picture` says whether there is a start picture.
    ///
    /// # Errors
    /// A condition that is missing, or that the model has no use for.
    pub fn check(&self, dit: &DitConfig, has_picture: bool) -> Result<()> {
        self.check_unread(dit)?;
        if dit.pictures() != Pictures::Condition {
            return Ok(());
        }
        let refuse = |why: &str| Err(refusal(why));
        match dit.kind {
            Kind::FunControl | Kind::FunControlExpert | Kind::FunControlInPlace if self.control.is_none() => {
                refuse(
                    "this model makes clips after a control clip: name one (--control, or --cv behind a prompt)",
                )
            }
            Kind::FunCamera | Kind::FunCameraExpert | Kind::FunCameraInPlace if self.camera.is_none() => {
                refuse(
                    "this model makes clips along a camera path: name a move or a file of poses (--camera, or --cam behind a prompt)",
                )
            }
            Kind::FunCamera | Kind::FunCameraExpert | Kind::FunCameraInPlace if !has_picture => {
                refuse("this model moves the camera in a picture: name one (--image, or --i behind a prompt)")
            }
            Kind::Animate if self.control.is_none() => refuse(
                "this model moves a character as a pose clip says: name one (--control, or --cv behind a prompt)",
            ),
            Kind::Animate if self.faces.is_none() => refuse(
                "this model reads the faces of a face clip: name one (--faces, or --fc behind a prompt)",
            ),
            Kind::Animate if self.references.is_empty() => refuse(
                "this model needs a picture of its character: name one (--reference, or --ref behind a prompt)",
            ),
            Kind::Animate if self.mask.is_some() != self.background.is_some() => refuse(
                "a character is put into a clip with both the clip and a mask of its place: name --background and --mask (--bg and \
                 --mk behind a prompt), or neither",
            ),
            Kind::Speech if self.audio.is_none() => {
                refuse("this model speaks what it hears: name the audio (--audio, or --au behind a prompt)")
            }
            Kind::Speech if self.references.is_empty() => refuse(
                "this model needs a picture of who speaks: name one (--reference, or --ref behind a prompt)",
            ),
            Kind::Speech if has_picture => refuse(
                "S2V takes the picture of who speaks as its reference (--reference, or --ref behind a prompt)",
            ),
            Kind::Vace if has_picture => refuse(
                "VACE takes pictures as references (--reference, or --ref behind a prompt), or as a control clip with a mask",
            ),
            Kind::Vace if self.mask.is_some() && self.control.is_none() => refuse(
                "a mask without the control clip that it is for: name that too (--control, or --cv behind a prompt)",
            ),
            _ => Ok(()),
        }
    }

    /// Checks that the model has a use for each, and that numbers are within their bounds.
    fn check_unread(&self, dit: &DitConfig) -> Result<()> {
        let refuse = |why: &str| Err(refusal(why));
        let facts = dit.kind.facts();
        let reads_control =
            facts.side_chain || facts.faces || facts.speech || facts.beside.contains(&Beside::Control);
        if self.control.is_some() && !reads_control {
            return refuse(
                "this model reads no control clip; leave it out, or take a Fun-Control, VACE, Animate or S2V model",
            );
        }
        if self.mask.is_some() && !facts.side_chain && !facts.faces {
            return refuse("this model reads no mask; leave it out, or take a VACE or Animate model");
        }
        if self.hint_scale.is_some() && !facts.side_chain {
            return refuse("this model has no hints to scale; leave the scale out, or take a VACE model");
        }
        if self.hint_scale.is_some_and(|scale| !(0.0..=MAX_HINT_SCALE).contains(&scale)) {
            return refuse(&format!("the scale of its hints must lie between 0 and {MAX_HINT_SCALE}"));
        }
        if (self.faces.is_some() || self.background.is_some()) && !facts.faces {
            return refuse(
                "this model reads no face clip and no background; leave them out, or take an Animate model",
            );
        }
        if self.camera.is_some() && !facts.camera {
            return refuse(
                "this model reads no camera path; leave it out, or take a Fun-Control-Camera model",
            );
        }
        if self.audio.is_some() && !facts.speech {
            return refuse("this model hears no speech; leave the audio out, or take an S2V model");
        }
        if self.piece_frames.is_some() && !facts.speech && !facts.faces {
            return refuse("this model makes clips in one piece; leave the frames of a piece out");
        }
        let rest = u32::from(facts.faces);
        let is_piece = |frames: u32| (4..=MAX_PIECE + rest).contains(&frames) && frames % 4 == rest;
        if self.piece_frames.is_some_and(|frames| !is_piece(frames)) {
            let form = if facts.faces { "of the form 4n+1, at least 5" } else { "a multiple of 4" };
            return refuse(&format!(
                "the frames of its pieces must be {form}, and at most {}",
                MAX_PIECE + rest
            ));
        }
        let most = match (facts.side_chain, dit.control.reference) {
            (true, _) => MAX_REFERENCES,
            (false, _) if facts.faces || facts.speech => 1,
            (false, Some(_)) => 1,
            (false, None) => 0,
        };
        if self.references.len() > most {
            return refuse(&format!(
                "{} reference pictures are given and the model reads {most}",
                self.references.len()
            ));
        }
        Ok(())
    }
}

fn refusal(why: &str) -> Error {
    Error::Setting { key: "conditions of a clip".into(), why: why.into() }
}

/// The largest factor of hints: beyond it nothing is left of the clip.
const MAX_HINT_SCALE: f64 = 10.0;
/// Frames of a piece of a long clip at most: the reference picture of S2V stands at the time of latent frame 30.
const MAX_PIECE: u32 = 120;
/// Reference pictures of a clip at most.
const MAX_REFERENCES: usize = 8;
