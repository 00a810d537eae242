//! From the fields of a request to a job.

use std::path::{Component, Path, PathBuf};

use clap::ValueEnum;
use models::expert::Expert;
use serde_json::Value;

use super::basis::{Basis, adapters_of_run, split_name};
use super::fields::Fields;
use super::job::{Chosen, Job, JobStatus, Settings, now};
use crate::encode::preset::{Preset, label};
use crate::encode::prompt::ClipRequest;
use crate::serve::Server;
use crate::serve::reply::Refusal;
use crate::solver::SolverKind;

/// The most bytes of a prompt.
const PROMPT: usize = 16 << 10;
/// The most adapters of a clip.
const ADAPTERS: usize = 16;

/// The job `id` that `fields` ask for, with the picture that came with them.
///
/// # Errors
/// The field that cannot be, and why.
pub(super) fn job(
    server: &Server,
    id: String,
    mut fields: Fields,
    image: Option<PathBuf>,
) -> Result<Job, Refusal> {
    let prompt = fields.text("prompt")?.ok_or_else(|| Refusal::field("prompt", "is missing"))?;
    let named = match fields.text("model")?.filter(|name| !name.is_empty()) {
        Some(name) => name,
        None => server.default_model().ok_or_else(|| {
            Refusal::field(
                "model",
                "there is no run and no model yet; train one, or start the server with --models",
            )
        })?,
    };
    let (name, step) = split_name(&named);
    let basis = Basis::of(server, name)?;
    if basis.run.is_none() && step.is_some() {
        return Err(Refusal::field("model", format!("{name} is not a run, so it has no steps")));
    }
    let (request, fps) = clip(&basis, &prompt, &mut fields, image)?;
    let mut adapters = basis.for_clips.clone();
    match (fields.take("lora"), &basis.run) {
        (Some(lora), _) => adapters.extend(loras(server, lora)?),
        (None, Some(_)) => adapters.extend(adapters_of_run(server, (name, step), 1.0)?),
        (None, None) => {}
    }
    // At strength 0 an adapter changes nothing.
    adapters.retain(|chosen| chosen.strength != 0.0);
    if adapters.len() > ADAPTERS {
        return Err(Refusal::field("lora", format!("names more than {ADAPTERS} adapters")));
    }
    let webhook = fields.text("webhook")?.or(fields.text("webhook_url")?);
    if webhook.as_ref().is_some_and(|url| !url.starts_with("http://") && !url.starts_with("https://")) {
        return Err(Refusal::field("webhook", "must be an address that starts with http:// or https://"));
    }
    let group = fields.text("group")?;
    fields.finish()?;
    request.check(basis.defaults.multiple())?;
    request.check_pictures(&basis.dit)?;
    let mut devices = basis.devices.stages.clone();
    devices.sort();
    devices.dedup();
    Ok(Job {
        id,
        object: "video".into(),
        model: named.clone(),
        prompt,
        status: JobStatus::Queued,
        progress: 0,
        created_at: now(),
        completed_at: None,
        expires_at: None,
        size: format!("{}x{}", request.width, request.height),
        seconds: format!("{:.2}", f64::from(request.frames) / fps),
        quality: "standard".into(),
        remixed_from_video_id: None,
        error: None,
        media_type: None,
        file_name: None,
        inference_time_s: None,
        waits_for: None,
        label: label(&request, 0),
        group,
        webhook,
        settings: Settings { request, fps, run: basis.run, devices, adapters },
    })
}

/// The clip, and its frames a second.
fn clip(
    basis: &Basis,
    prompt: &str,
    fields: &mut Fields,
    image: Option<PathBuf>,
) -> Result<(ClipRequest, f64), Refusal> {
    if prompt.trim().is_empty() || prompt.len() > PROMPT {
        return Err(Refusal::field("prompt", "must have 1 to 16384 bytes"));
    }
    let own = basis.request.clone();
    let (width, height) = size(fields, &image, basis)?;
    let fps = fields.number("fps")?.unwrap_or(basis.fps);
    if !(1.0..=240.0).contains(&fps) {
        return Err(Refusal::field("fps", "must be 1 to 240"));
    }
    let seconds = fields.number("seconds")?;
    let frames = match (fields.whole::<u32>("num_frames")?, seconds) {
        // Clients ask for 80 frames where Wan makes 81.
        (Some(frames), _) => frames.saturating_sub(1).div_ceil(4).saturating_mul(4).saturating_add(1),
        (None, Some(seconds)) if (0.0..=3600.0).contains(&seconds) => {
            (seconds * fps / 4.0).ceil() as u32 * 4 + 1
        }
        (None, Some(_)) => return Err(Refusal::field("seconds", "must be 0 to 3600")),
        (None, None) => own.frames,
    };
    if let Some(boundary) = fields.number("boundary_ratio")?
        && basis.model.boundary != Some(boundary)
    {
        return Err(Refusal::field("boundary_ratio", "is that of the model, and cannot be changed here"));
    }
    let guidance = fields.number("guidance_scale")?;
    let request = ClipRequest {
        prompt: prompt.to_owned(),
        negative: fields.text("negative_prompt")?.unwrap_or(own.negative),
        width,
        height,
        frames,
        steps: fields.whole("num_inference_steps")?.unwrap_or(own.steps),
        guidance: guidance.unwrap_or(own.guidance),
        guidance_high: fields.number("guidance_scale_2")?.or(guidance).unwrap_or(own.guidance_high),
        shift: fields.number("flow_shift")?.unwrap_or(own.shift),
        seed: fields.whole("seed")?.unwrap_or(own.seed),
        solver: named::<SolverKind>(fields, "solver")?.unwrap_or(own.solver),
        image,
        ..own
    };
    Ok(match named::<Preset>(fields, "preset")? {
        Some(preset) => (preset.over(request), fps),
        None => (request, fps),
    })
}

/// Width and height: `size`, else `width` and `height`, else those that fit the picture, else the model's.
fn size(fields: &mut Fields, image: &Option<PathBuf>, basis: &Basis) -> Result<(u32, u32), Refusal> {
    let (width, height) = (fields.whole::<u32>("width")?, fields.whole::<u32>("height")?);
    if let Some(size) = fields.text("size")? {
        let sides = size.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        return sides.ok_or_else(|| Refusal::field("size", format!("{size:?} is not like 832x480")));
    }
    let own = &basis.request;
    let [own_width, own_height] = match image {
        Some(path) if width.is_none() || height.is_none() => {
            let picture = data::Picture::open(path)
                .map_err(|error| Refusal::field("input_reference", error.to_string()))?;
            let defaults = models::published::Defaults { size: [own.width, own.height], ..basis.defaults };
            defaults.size_for(picture.width(), picture.height())
        }
        _ => [own.width, own.height],
    };
    Ok((width.unwrap_or(own_width), height.unwrap_or(own_height)))
}

/// A choice by its name.
fn named<T: ValueEnum>(fields: &mut Fields, name: &str) -> Result<Option<T>, Refusal> {
    let Some(text) = fields.text(name)? else { return Ok(None) };
    let choice = T::from_str(&text, false).map_err(|_| {
        let known: Vec<String> = T::value_variants()
            .iter()
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect();
        Refusal::field(name, format!("{text:?} is none of {}", known.join(", ")))
    })?;
    Ok(Some(choice))
}

/// The adapters that the field `lora` names: an object or a list of them, each with name or path, scale and expert.
fn loras(server: &Server, lora: Value) -> Result<Vec<Chosen>, Refusal> {
    let lora = match lora {
        // As it comes in a form.
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|error| Refusal::field("lora", error.to_string()))?
        }
        lora => lora,
    };
    let all = match lora {
        Value::Array(all) => all,
        one => vec![one],
    };
    let mut chosen = Vec::new();
    for one in all {
        let mut fields = Fields::of(one)?;
        let (name, path) = (fields.text("name")?, fields.text("path")?.filter(|path| !path.is_empty()));
        let scale = fields.number("scale")?.unwrap_or(1.0);
        let expert = match fields.text("expert")?.as_deref() {
            None => None,
            Some("high") => Some(Expert::High),
            Some("low") => Some(Expert::Low),
            Some(_) => return Err(Refusal::field("lora.expert", "must be high or low")),
        };
        // Numbers of adapters are vLLM-Omni's own affair.
        fields.take("int_id");
        fields.finish()?;
        if scale.abs() > 100.0 {
            return Err(Refusal::field("lora.scale", "must be -100 to 100"));
        }
        match (name, path) {
            (name, Some(path)) => {
                let path = adapter_file(server, &path)?;
                let name = name.unwrap_or_else(|| path.display().to_string());
                chosen.push(Chosen { name, path, strength: scale, expert });
            }
            (Some(name), None) => {
                let split = split_name(&name);
                let is_run =
                    server.places.run(split.0).is_some_and(|folder| folder.join("plan.toml").is_file());
                match is_run {
                    true => chosen.extend(adapters_of_run(server, split, scale)?),
                    false => {
                        let path = adapter_file(server, &name)?;
                        chosen.push(Chosen { name, path, strength: scale, expert });
                    }
                }
            }
            (None, None) => return Err(Refusal::field("lora", "needs a name or a path")),
        }
    }
    Ok(chosen)
}

/// The adapter `named`: a file or PEFT folder in the folders of models or of runs, by its path or its name.
fn adapter_file(server: &Server, named: &str) -> Result<PathBuf, Refusal> {
    let climbs = Path::new(named).components().any(|part| part == Component::ParentDir);
    let roots = server.places.models.iter().chain([&server.places.runs]);
    let with_ending = format!("{named}.safetensors");
    let candidates = roots.flat_map(|root| [root.join(named), root.join(&with_ending)]);
    let found = std::iter::once(Path::new(named).to_owned())
        .filter(|path| path.is_absolute())
        .chain(candidates)
        .find(|path| !climbs && path.exists() && server.places.contain(path));
    found.ok_or_else(|| {
        Refusal::field(
            "lora",
            format!("there is no run and no adapter {named} in the folders of this server"),
        )
    })
}
