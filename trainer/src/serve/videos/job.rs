//! A clip that was asked for: what OpenAI's API tells of a video, and the settings that it is made with.

use std::path::PathBuf;

use models::expert::Expert;
use serde::{Deserialize, Serialize};

use crate::encode::prompt::ClipRequest;

/// A clip that was asked for, as clients see it and as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Job {
    pub id: String,
    /// `video`.
    pub object: String,
    /// A run, a checkpoint of one (`fox@150`), or a model.
    pub model: String,
    pub prompt: String,
    pub status: JobStatus,
    /// Percent of the solver steps.
    pub progress: u8,
    /// Seconds since 1970.
    pub created_at: u64,
    pub completed_at: Option<u64>,
    /// Clips are kept until they are deleted.
    pub expires_at: Option<u64>,
    /// `WIDTHxHEIGHT`.
    pub size: String,
    pub seconds: String,
    pub quality: String,
    pub remixed_from_video_id: Option<String>,
    pub error: Option<JobError>,
    pub media_type: Option<String>,
    pub file_name: Option<String>,
    /// From when the models were asked for to the written file.
    pub inference_time_s: Option<f64>,
    /// What the clip waits for.
    pub waits_for: Option<String>,
    /// How it differs from what the model makes in all of its steps.
    pub label: Option<String>,
    /// Clips that belong together, such as a sweep.
    pub group: Option<String>,
    /// Where the job is sent when it ends.
    pub webhook: Option<String>,
    pub settings: Settings,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::serve) enum JobStatus {
    Queued,
    InProgress,
    Completed,
    Failed,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct JobError {
    /// `cancelled`, or `failed`.
    pub code: String,
    pub message: String,
}

/// Everything that a clip is made with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Settings {
    /// The clip.
    pub request: ClipRequest,
    /// Frames a second of the file.
    pub fps: f64,
    /// The run that model, devices and cache are those of; else `model` is a folder of the server's.
    pub run: Option<String>,
    /// The devices.
    pub devices: Vec<String>,
    /// The adapters, in the order in which they are applied.
    pub adapters: Vec<Chosen>,
}

/// An adapter for a clip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Chosen {
    pub name: String,
    pub path: PathBuf,
    pub strength: f64,
    /// The network that it is for, of a model of two; all where nothing is said.
    pub expert: Option<Expert>,
}

impl Job {
    /// Whether nothing more will happen to it.
    pub fn is_over(&self) -> bool {
        matches!(self.status, JobStatus::Completed | JobStatus::Failed)
    }
}

/// Seconds since 1970.
pub(in crate::serve) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
