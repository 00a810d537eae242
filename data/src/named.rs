//! Files that a list of clips names for each: its control clip, mask, face clip, reference pictures, speech, camera path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The key of control clips.
pub(crate) const CONTROL: &str = "control";
/// The key of masks.
pub(crate) const MASKS: &str = "masks";
/// The key of face clips.
pub(crate) const FACES: &str = "faces";
/// The key of reference pictures, of which a clip may have several.
pub(crate) const REFERENCES: &str = "references";
/// The key of speech.
pub(crate) const AUDIO: &str = "audio";
/// The key of camera paths.
pub(crate) const CAMERAS: &str = "cameras";

/// Keys of `[data]` for what accompanies clips.
pub const COMPANION_KEYS: [&str; 6] = [CONTROL, MASKS, FACES, REFERENCES, AUDIO, CAMERAS];

/// Columns of lists, each with the key whose meaning its files have. Those with `video` and `image` are DiffSynth-Studio's
/// (`--data_file_keys`), `control_path` is musubi-tuner's.
const COLUMNS: [(&str, &str); 17] = [
    ("control", CONTROL),
    ("control_path", CONTROL),
    ("control_video", CONTROL),
    ("vace_video", CONTROL),
    ("animate_pose_video", CONTROL),
    ("s2v_pose_video", CONTROL),
    ("mask", MASKS),
    ("vace_video_mask", MASKS),
    ("animate_mask_video", MASKS),
    ("face", FACES),
    ("animate_face_video", FACES),
    ("reference", REFERENCES),
    ("reference_image", REFERENCES),
    ("vace_reference_image", REFERENCES),
    ("audio", AUDIO),
    ("input_audio", AUDIO),
    ("camera", CAMERAS),
];

/// The columns whose files have the meaning of one of `keys`, each with its key.
pub(crate) fn columns(keys: &[&'static str]) -> impl Iterator<Item = (&'static str, &'static str)> {
    COLUMNS.into_iter().filter(|(_, key)| keys.contains(key))
}

/// The files that are named for a clip, by the keys whose meaning they have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Named(BTreeMap<&'static str, Vec<PathBuf>>);

impl Named {
    /// The files of a row, as a list names them, at the places that `place` gives.
    pub(crate) fn of(files: &[(&'static str, String)], place: impl Fn(&str) -> PathBuf) -> Self {
        let mut named = Self::default();
        for (key, file) in files {
            named.0.entry(key).or_default().push(place(file));
        }
        named
    }

    /// The files of a key, in their order; for all but reference pictures at most one.
    pub fn all(&self, key: &str) -> &[PathBuf] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// The file of a key.
    pub fn one(&self, key: &str) -> Option<&Path> {
        self.all(key).first().map(PathBuf::as_path)
    }
}
