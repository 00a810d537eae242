//! The conditioning of control models from pixels, masks and poses.

use kernels::{Device, Tensor};
use models::published::Kind;
use models::vae::{TEMPORAL_RATIO, Vae, latent_frames};

use super::{Inputs, Outputs};
use crate::encode::conditions::camera::{NUMBERS, Pose, packed, pluecker};
use crate::encode::conditions::fun::{FunLatents, given_latents, mask_latents};
use crate::encode::conditions::{animate, latents, speech, vace};
use crate::error::{Error, Result};

/// Every condition that `inputs` has the parts of; `references` names pictures of VACE, in their order, `clip_frames` how many frames
/// a clip of S2V has. The names are those of the command's help.
///
/// # Errors
/// A reference that is not there, tensors of other shapes, and an input of which nothing can be made.
pub fn make(
    vae: &Vae,
    inputs: &Inputs,
    (references, no_video, clip_frames): (&[String], bool, usize),
) -> Result<Outputs> {
    let mut outputs = Outputs::new();
    let clip = inputs.optional("video")?;
    let of = |name: &str| inputs.optional(name)?.map(|pixels| latents(vae, &pixels)).transpose();
    let parts = FunLatents { control: of("control_video")?, start: of("start_image")?, given: None };
    let reference = of("ref_image")?.map(|latents| latents.squeeze(2)).transpose()?;
    outputs.extend(reference.map(|latents| ("ref_latent".to_owned(), latents)));
    of_fun(&parts, clip.as_ref(), &mut outputs)?;
    for name in inputs.names().filter(|name| name.starts_with("mask") && !name.starts_with("masked")) {
        if let (Some(video), false) = (&clip, name.contains("latents")) {
            let mask = inputs.ranked(name, 5)?;
            of_mask(vae, (video, &mask), &parts, &name["mask".len()..], &mut outputs)?;
        }
    }
    for name in inputs.names().filter(|name| name.starts_with("poses")) {
        of_poses(inputs, name, &mut outputs)?;
    }
    of_vace(vae, inputs, (clip, no_video), references, &mut outputs)?;
    let poses = inputs.optional("pose_video")?;
    match poses {
        Some(poses) if poses.dim(2)?.is_multiple_of(TEMPORAL_RATIO) => {
            of_speech(vae, inputs, &poses, &mut outputs)?;
        }
        Some(poses) => of_animate(vae, inputs, &poses, &mut outputs)?,
        None => {}
    }
    of_audio(inputs, clip_frames, &mut outputs)?;
    match outputs.is_empty() {
        false => Ok(outputs),
        true => Err(inputs.refuse("nothing can be made of what it holds; see --help".into())),
    }
}

/// Of a control clip and a start picture; without a control clip, `clip` says how long it is.
fn of_fun(parts: &FunLatents, clip: Option<&Tensor>, outputs: &mut Outputs) -> Result<()> {
    let frames = match (&parts.control, clip) {
        (Some(control), _) => control.dim(2)?,
        (None, Some(clip)) => latent_frames(clip.dim(2)?),
        (None, None) => return Ok(()),
    };
    let Some(like) = parts.control.as_ref().or(parts.start.as_ref()) else { return Ok(()) };
    let [channels, _, height, width] = shape(like)?;
    let mut add = |name: &str, kind: Kind, parts: &FunLatents| -> Result<()> {
        let y = parts.beside(kind.facts().beside, [channels, frames, height, width])?;
        outputs.extend(y.map(|y| (name.to_owned(), y)));
        Ok(())
    };
    if parts.start.is_some() {
        add("y_camera11", Kind::FunCamera, parts)?;
    }
    if let Some(control) = &parts.control {
        add("y_control11", Kind::FunControl, &FunLatents { start: None, ..parts.clone() })?;
        if parts.start.is_some() {
            add("y_control11_start", Kind::FunControl, parts)?;
        }
        outputs.insert("control_latents".into(), control.clone());
    }
    Ok(())
}

/// Of a mask over a clip; `end` ends the names.
fn of_mask(
    vae: &Vae,
    (video, mask): (&Tensor, &Tensor),
    parts: &FunLatents,
    end: &str,
    outputs: &mut Outputs,
) -> Result<()> {
    let stride = video.dim(4)?;
    let kept = given_latents(vae, video, mask)?;
    let mask = mask_latents(mask, stride / kept.dim(4)?)?;
    outputs.insert(format!("mask_latents{end}"), mask.clone());
    outputs.insert(format!("masked_latents{end}"), kept.clone());
    let (like, has_control) = (shape(&kept)?, parts.control.is_some());
    let parts = FunLatents { given: Some((mask, kept)), ..parts.clone() };
    let mut add = |name: &str, kind: Kind| -> Result<()> {
        let y = parts.beside(kind.facts().beside, like)?;
        outputs.extend(y.map(|y| (format!("{name}{end}"), y)));
        Ok(())
    };
    add("y_inp", Kind::Picture)?;
    if has_control {
        add("y_control22", Kind::FunControlExpert)?;
    }
    Ok(())
}

/// Of camera poses, for pixels of the size of any of the clips.
fn of_poses(inputs: &Inputs, name: &str, outputs: &mut Outputs) -> Result<()> {
    let Some(rows) = inputs.rows(name)? else { return Ok(()) };
    let pose = |row: Vec<f64>| Pose::try_from(row).ok();
    let poses: Option<Vec<Pose>> = rows.into_iter().map(pose).collect();
    let poses =
        poses.ok_or_else(|| inputs.refuse(format!("`{name}`: {NUMBERS} numbers a pose are expected")))?;
    let clips = ["video", "control_video", "start_image", "ref_image"];
    let Some(clip) = clips.into_iter().find_map(|clip| inputs.optional(clip).transpose()) else {
        return Err(inputs.refuse(format!("`{name}` needs one of {} for the size", clips.join(", "))));
    };
    let (_, _, _, height, width) = clip?.dims5()?;
    let end = &name["poses".len()..];
    outputs.insert(format!("pluecker{end}"), pluecker(&poses, (height, width))?.squeeze(0)?);
    outputs.insert(format!("camera{end}"), packed(&poses, (height, width))?);
    Ok(())
}

/// Of a clip with its mask, and of the pictures that `references` names.
fn of_vace(
    vae: &Vae,
    inputs: &Inputs,
    (clip, no_video): (Option<Tensor>, bool),
    references: &[String],
    outputs: &mut Outputs,
) -> Result<()> {
    let Some(clip) = clip else { return Ok(()) };
    let (_, _, frames, height, width) = clip.dims5()?;
    let mut pictures = Vec::new();
    for name in references {
        let picture = inputs.float(name)?;
        // Of one frame or of none.
        let picture = if picture.rank() == 5 { picture.squeeze(2)? } else { picture };
        if picture.dims()[2..] == [height, width] {
            pictures.push(picture.unsqueeze(2)?);
            continue;
        }
        let canvas = vace::on_canvas(&picture, (height, width), vace::Canvas::White)?;
        outputs.insert(format!("{name}_canvas"), canvas.clone());
        pictures.push(canvas);
    }
    let everything = || Tensor::ones((1, 1, frames, height, width), kernels::DType::F32, &Device::Cpu);
    let mask = if no_video { None } else { inputs.optional("mask")? };
    let mask = mask.map_or_else(everything, Ok)?;
    let clip = if no_video { clip.zeros_like()? } else { clip };
    outputs.insert("vace_context".into(), vace::context(vae, (&clip, &mask), &pictures)?);
    Ok(())
}

/// Of Animate's pose clip, reference picture, background and character mask, and the frames of the clip before.
fn of_animate(vae: &Vae, inputs: &Inputs, poses: &Tensor, outputs: &mut Outputs) -> Result<()> {
    let pose_latents = latents(vae, poses)?;
    let [_, _, height, width] = shape(&pose_latents)?;
    outputs.insert("pose_latents".into(), pose_latents);
    let Some(reference) = inputs.optional("ref")?.map(|pixels| latents(vae, &pixels)).transpose()? else {
        return Ok(());
    };
    let size = (poses.dim(2)?, height, width);
    let known = inputs.optional("prev_frames")?;
    let mut add = |mode: &str, video: &Tensor, character: Option<&Tensor>| -> Result<()> {
        let first = animate::mask(character, size, 0)?;
        let y = animate::beside(&reference, &first, &latents(vae, video)?)?;
        outputs.insert(format!("y_{mode}_first"), y);
        if let Some(known) = &known {
            let mask = animate::mask(character, size, known.dim(2)?)?;
            let video = latents(vae, &animate::continued(known, video)?)?;
            outputs.insert(format!("y_{mode}_next"), animate::beside(&reference, &mask, &video)?);
        }
        Ok(())
    };
    add("move", &poses.zeros_like()?, None)?;
    if let Some(background) = inputs.optional("bg_video")? {
        add("replace", &background, Some(&inputs.ranked("mask", 5)?))?;
    }
    Ok(())
}

/// Of S2V's pose clip of 4t frames, its reference picture and the frames before.
fn of_speech(vae: &Vae, inputs: &Inputs, poses: &Tensor, outputs: &mut Outputs) -> Result<()> {
    outputs.insert("pose_latents".into(), speech::pose_latents(vae, poses)?);
    for (input, output) in [("ref", "ref_latent"), ("motion_video", "motion_latents")] {
        let made = inputs.optional(input)?.map(|pixels| latents(vae, &pixels)).transpose()?;
        outputs.extend(made.map(|made| (output.to_owned(), made)));
    }
    Ok(())
}

/// Of the speech encoder's states.
fn of_audio(inputs: &Inputs, clip_frames: usize, outputs: &mut Outputs) -> Result<()> {
    let Some(states) = inputs.optional("audio_hidden_50hz")? else { return Ok(()) };
    let (states, fps) = (speech::at_middle_rate(&states)?, Kind::Speech.facts().whole.fps);
    let count = speech::clips(states.dim(1)?, clip_frames, fps);
    let clip = |n: usize| speech::of_frames(&states, (n * clip_frames, clip_frames), fps);
    let clips = (0..count).map(clip).collect::<Result<Vec<_>>>()?;
    outputs.insert("audio_clips".into(), Tensor::stack(&clips, 0)?);
    outputs.insert("audio_hidden_30hz".into(), states);
    Ok(())
}

/// [c, t, h, w] of latents [1, c, t, h, w].
fn shape(latents: &Tensor) -> Result<[usize; 4]> {
    let (_, c, t, h, w) = latents.dims5().map_err(Error::from)?;
    Ok([c, t, h, w])
}
