//! The shapes of the clips of a plan, by which its memory is forecast.

use data::{DataConfig, Dataset};
use models::dit::DitConfig;
use models::published::Defaults;

use super::conditions::{check_driving, frames_beyond};
use super::required;
use crate::error::Result;
use crate::machine::memory;

/// The shapes of the buckets, and those that the recipe's sizes and lengths make, with the latent frames beyond each clip's own;
/// and how many these are, see [`models::dit::Control::frames_beyond`].
///
/// # Errors
/// Clips without what the model learns from, clips that are driven by themselves, and clips with different numbers of such frames that
/// are to be in one batch.
pub(super) fn settled(
    (data, dataset): (&DataConfig, &Dataset),
    (dit, defaults): (&DitConfig, &Defaults),
    batch: usize,
) -> Result<(memory::Shapes, isize)> {
    required::check(data, dataset, dit)?;
    check_driving(dataset, dit)?;
    let beyond = frames_beyond(dataset, dit, batch)?;
    let buckets = dataset.windows.iter().map(|window| window.bucket);
    let there = buckets.map(|bucket| (bucket.width, bucket.height, bucket.frames));
    let sizes = data.sizes.iter().flat_map(|[w, h]| data.frames.iter().map(move |frames| (*w, *h, *frames)));
    let (there, possible) = (ordered(there, defaults, beyond), ordered(sizes, defaults, beyond));
    Ok((memory::Shapes { there, possible }, beyond))
}

/// Shapes from (width, height, frames), each once, from large to small.
fn ordered(
    clips: impl Iterator<Item = (u32, u32, u32)>,
    defaults: &Defaults,
    beyond: isize,
) -> Vec<memory::Shape> {
    let mut clips: Vec<_> = clips.collect();
    clips.sort_by_key(|&(width, height, frames)| std::cmp::Reverse((width * height * frames, width, height)));
    clips.dedup();
    let shape = |(width, height, frames)| {
        let (latent_frames, tall, wide) = defaults.latents(frames, height, width);
        (
            format!("{width}x{height}, {frames} frames"),
            (latent_frames.saturating_add_signed(beyond), tall, wide),
        )
    };
    clips.into_iter().map(shape).collect()
}
