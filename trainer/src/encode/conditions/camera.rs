//! Camera paths: poses from a file or a named move, and the rays of every pixel that Fun's camera adapter reads.
//!
//! Sources: aigc-apps/VideoX-Fun videox_fun/data/utils.py (`process_pose_file`, `ray_condition`); modelscope/DiffSynth-Studio
//! diffsynth/models/wan_video_camera_controller.py (`generate_camera_coordinates`).

use std::path::Path;

use kernels::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::by_latent_frame;
use crate::error::{Error, Result};

/// Numbers of a pose: id, fx, fy, cx, cy, two zeros, and the rows of the 3 x 4 matrix from the world to the camera.
pub const NUMBERS: usize = 19;
/// Width over height of the camera that the focal lengths of poses are for.
const ASPECT: f64 = 1280.0 / 720.0;
/// Focal lengths of named moves, as fractions of width and height.
const FOCAL: [f64; 2] = [0.532139961, 0.946026558];
/// How far a named move goes in a frame.
const SPEED: f64 = 1.0 / 54.0;

/// A pose of a camera.
pub type Pose = [f64; NUMBERS];

/// A camera move by name. The signs are DiffSynth-Studio's: `left` moves the world to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Move {
    /// To the left.
    Left,
    /// To the right.
    Right,
    /// Up.
    Up,
    /// Down.
    Down,
    /// Left and up.
    LeftUp,
    /// Left and down.
    LeftDown,
    /// Right and up.
    RightUp,
    /// Right and down.
    RightDown,
    /// Into the picture.
    In,
    /// Out of it.
    Out,
}

impl Move {
    /// The direction of the translation from the world to the camera.
    fn direction(self) -> [f64; 3] {
        match self {
            Self::Left => [1.0, 0.0, 0.0],
            Self::Right => [-1.0, 0.0, 0.0],
            Self::Up => [0.0, 1.0, 0.0],
            Self::Down => [0.0, -1.0, 0.0],
            Self::LeftUp => [1.0, 1.0, 0.0],
            Self::LeftDown => [1.0, -1.0, 0.0],
            Self::RightUp => [-1.0, 1.0, 0.0],
            Self::RightDown => [-1.0, -1.0, 0.0],
            Self::In => [0.0, 0.0, -1.0],
            Self::Out => [0.0, 0.0, 1.0],
        }
    }

    /// The poses of a clip of `frames` frames.
    pub fn poses(self, frames: usize) -> Vec<Pose> {
        let [x, y, z] = self.direction();
        let pose = |frame: usize| {
            let far = SPEED * frame as f64;
            let matrix = [1.0, 0.0, 0.0, x * far, 0.0, 1.0, 0.0, y * far, 0.0, 0.0, 1.0, z * far];
            let mut pose = [0.0; NUMBERS];
            pose[..7].copy_from_slice(&[frame as f64, FOCAL[0], FOCAL[1], 0.5, 0.5, 0.0, 0.0]);
            pose[7..].copy_from_slice(&matrix);
            pose
        };
        (0..frames).map(pose).collect()
    }
}

/// The poses in a text file: a line of 19 numbers for each frame, with spaces between; a first line of other words, such as a
/// link, is skipped.
///
/// # Errors
/// A file that cannot be read, and lines that are not poses.
pub fn read(path: &Path) -> Result<Vec<Pose>> {
    let refuse =
        |why: String| Error::Setting { key: "camera path".into(), why: format!("{}: {why}", path.display()) };
    let text =
        std::fs::read_to_string(path).map_err(|error| refuse(format!("it cannot be read: {error}")))?;
    let mut poses = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let numbers: Option<Vec<f64>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
        match numbers.map(Pose::try_from) {
            _ if line.trim().is_empty() => {}
            Some(Ok(pose)) if pose.iter().all(|number| number.is_finite()) => poses.push(pose),
            Some(Err(numbers)) if index > 0 || numbers.len() > 1 => {
                return Err(refuse(format!(
                    "line {} has {} numbers: {NUMBERS} are expected (id, fx, fy, cx, cy, 0, 0, and the rows of a 3x4 matrix \
                     from the world to the camera)",
                    index + 1,
                    numbers.len()
                )));
            }
            _ if index == 0 => {}
            _ => return Err(refuse(format!("line {} holds something else than numbers", index + 1))),
        }
    }
    match poses.iter().find(|pose| pose[1] <= 0.0 || pose[2] <= 0.0) {
        Some(pose) => Err(refuse(format!("the focal lengths {} and {} must be above 0", pose[1], pose[2]))),
        None if poses.is_empty() => Err(refuse("it has no poses".into())),
        None => Ok(poses),
    }
}

/// Which pose each of `frames` frames of a clip that starts at `start` has: one for each frame, at the clip's own rate.
///
/// # Errors
/// Fewer poses than the clip has frames.
pub fn of_clip(poses: &[Pose], start: usize, frames: usize) -> Result<&[Pose]> {
    poses.get(start..start + frames).ok_or_else(|| Error::Setting {
        key: "camera path".into(),
        why: format!("it has {} poses; the clip needs {} (one for each frame)", poses.len(), start + frames),
    })
}

/// The Pluecker coordinates [1, 6, f, h, w] f32 of the rays through every pixel, in the first pose's frame.
///
/// # Errors
/// A matrix that cannot be inverted.
pub fn pluecker(poses: &[Pose], (height, width): (usize, usize)) -> Result<Tensor> {
    let (plane, frames) = (height * width, poses.len());
    let mut values = vec![0f32; 6 * frames * plane];
    let first = poses.first().map(matrix).unwrap_or(IDENTITY);
    for (frame, pose) in poses.iter().enumerate() {
        let relative = match frame {
            0 => IDENTITY,
            _ => product(&first, &inverse(&matrix(pose))?),
        };
        let lens = lens(pose, (height as f64, width as f64));
        for (pixel, ray) in rays(&relative, lens, (height, width)).enumerate() {
            for (channel, value) in ray.into_iter().enumerate() {
                values[(channel * frames + frame) * plane + pixel] = value;
            }
        }
    }
    Ok(Tensor::from_vec(values, (1, 6, frames, height, width), &Device::Cpu)?)
}

/// The rays [1, 24, t, h, w] as the adapter reads them: those of the frames of a latent frame side by side.
///
/// # Errors
/// Those of [`pluecker`] and [`by_latent_frame`].
pub fn packed(poses: &[Pose], size: (usize, usize)) -> Result<Tensor> {
    by_latent_frame(&pluecker(poses, size)?)
}

type Matrix = [[f64; 4]; 4];

const IDENTITY: Matrix =
    [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]];

fn matrix(pose: &Pose) -> Matrix {
    let row = |row: usize| [0, 1, 2, 3].map(|column| pose[7 + 4 * row + column]);
    [row(0), row(1), row(2), IDENTITY[3]]
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let cell = |row: usize, column: usize| (0..4).map(|k| a[row][k] * b[k][column]).sum();
    [0, 1, 2, 3].map(|row| [0, 1, 2, 3].map(|column| cell(row, column)))
}

/// The inverse of an affine matrix.
fn inverse(m: &Matrix) -> Result<Matrix> {
    // The rows of the inverse are the cross products of the columns over the determinant.
    let column = |j: usize| [m[0][j], m[1][j], m[2][j]];
    let (a, b, c) = (column(0), column(1), column(2));
    let rows = [cross(b, c), cross(c, a), cross(a, b)];
    let determinant = dot(a, rows[0]);
    if !determinant.is_normal() {
        let why = "a matrix of a pose cannot be inverted: its rows must be a rotation".into();
        return Err(Error::Setting { key: "camera path".into(), why });
    }
    let rows = rows.map(|row| row.map(|value| value / determinant));
    let line = |i: usize| [rows[i][0], rows[i][1], rows[i][2], -dot(rows[i], column(3))];
    Ok([line(0), line(1), line(2), IDENTITY[3]])
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| a * b).sum()
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

/// fx, fy, cx, cy in pixels of a clip of this height and width.
fn lens(pose: &Pose, (height, width): (f64, f64)) -> [f32; 4] {
    let [fx, fy] = match ASPECT > width / height {
        true => [height * ASPECT * pose[1] / width, pose[2]],
        false => [pose[1], width / ASPECT * pose[2] / height],
    };
    [fx * width, fy * height, pose[3] * width, pose[4] * height].map(|value| value as f32)
}

/// The Pluecker coordinates of the ray through each pixel, row by row, in f32 as the original has them.
fn rays(
    relative: &Matrix,
    [fx, fy, cx, cy]: [f32; 4],
    (height, width): (usize, usize),
) -> impl Iterator<Item = [f32; 6]> {
    let m = relative.map(|row| row.map(|value| value as f32));
    let origin = [m[0][3], m[1][3], m[2][3]];
    (0..height * width).map(move |pixel| {
        let (row, column) = (pixel / width, pixel % width);
        let (x, y) = ((column as f32 + 0.5 - cx) / fx, (row as f32 + 0.5 - cy) / fy);
        let length = (x * x + y * y + 1.0).sqrt();
        let d = [x / length, y / length, 1.0 / length];
        let d = [0, 1, 2].map(|i| m[i][0] * d[0] + m[i][1] * d[1] + m[i][2] * d[2]);
        let o = origin;
        let moment = [o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0]];
        [moment[0], moment[1], moment[2], d[0], d[1], d[2]]
    })
}
