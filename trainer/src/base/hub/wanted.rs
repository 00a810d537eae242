//! Which files of a repository a model needs.

use clap::ValueEnum;

use super::api::RemoteFile;

/// A part of a model to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Wanted {
    /// The diffusion transformer, or both experts.
    Dit,
    /// The expert for high noise alone.
    DitHigh,
    /// The expert for low noise alone.
    DitLow,
    /// The video VAE.
    Vae,
    /// UMT5.
    TextEncoder,
    /// UMT5's tokenizer.
    Tokenizer,
    /// The CLIP vision tower, where the model has one.
    Clip,
    /// The speech encoder, where the model has one (S2V).
    SpeechEncoder,
    /// The tiny decoder of previews for latents of 16 channels, from a repository that has it.
    #[value(name = "taew2_1")]
    TinyDecoder21,
    /// The tiny decoder of previews for models of 5B, from a repository that has it.
    #[value(name = "taew2_2")]
    TinyDecoder22,
}

/// Files that identify the kind of a repository.
const ALWAYS: [&str; 2] = ["model_index.json", "configuration.json"];

impl Wanted {
    /// All that a model has.
    pub const ALL: [Self; 6] =
        [Self::Dit, Self::Vae, Self::TextEncoder, Self::Tokenizer, Self::Clip, Self::SpeechEncoder];

    /// Whether the file `name` belongs to this part, in either layout.
    fn takes(self, name: &str) -> bool {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        let is_weights = file.ends_with(".safetensors") || file.ends_with(".safetensors.index.json");
        let is_model = is_weights || file == "config.json";
        match self {
            Self::Dit => {
                // An official folder of one DiT has it at the top, among VAE and text encoder.
                let is_top = folder.is_empty()
                    && (file == "config.json" || (is_weights && file.starts_with("diffusion_pytorch_model")));
                is_top || Self::DitHigh.takes(name) || Self::DitLow.takes(name)
            }
            Self::DitHigh => is_model && ["high_noise_model", "transformer"].contains(&folder),
            Self::DitLow => is_model && ["low_noise_model", "transformer_2"].contains(&folder),
            Self::Vae => {
                (is_model && folder == "vae") || is_top_weights(folder, file, &["Wan2.1_VAE.", "Wan2.2_VAE."])
            }
            Self::TextEncoder => {
                (is_model && folder == "text_encoder")
                    || is_top_weights(folder, file, &["models_t5_umt5-xxl-enc"])
            }
            Self::Tokenizer => file == "tokenizer.json" && ["google/umt5-xxl", "tokenizer"].contains(&folder),
            Self::Clip => {
                (is_model && folder == "image_encoder")
                    || is_top_weights(folder, file, &["models_clip_open-clip"])
            }
            Self::SpeechEncoder => is_model && folder == "wav2vec2-large-xlsr-53-english",
            Self::TinyDecoder21 => is_weights_of(file, "taew2_1"),
            Self::TinyDecoder22 => is_weights_of(file, "taew2_2"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dit => "diffusion transformer",
            Self::DitHigh => "expert for high noise",
            Self::DitLow => "expert for low noise",
            Self::Vae => "VAE",
            Self::TextEncoder => "text encoder",
            Self::Tokenizer => "tokenizer",
            Self::Clip => "CLIP vision tower",
            Self::SpeechEncoder => "speech encoder",
            Self::TinyDecoder21 => "taew2_1",
            Self::TinyDecoder22 => "taew2_2",
        }
    }
}

fn is_top_weights(folder: &str, file: &str, starts: &[&str]) -> bool {
    let is_weights = file.ends_with(".pth") || file.ends_with(".safetensors");
    folder.is_empty() && is_weights && starts.iter().any(|start| file.starts_with(start))
}

fn is_weights_of(file: &str, stem: &str) -> bool {
    ["pth", "safetensors"].iter().any(|ending| file == format!("{stem}.{ending}"))
}

/// The files of `wanted`, small ones first, so that errors show early.
///
/// # Errors
/// The part that has no file; not every model has a CLIP tower or a speech encoder.
pub(super) fn select(files: &[RemoteFile], wanted: &[Wanted]) -> Result<Vec<RemoteFile>, String> {
    let is_weights =
        |file: &RemoteFile| !file.name.ends_with(".json") || file.name.ends_with("tokenizer.json");
    let is_optional = |part: &Wanted| matches!(part, Wanted::Clip | Wanted::SpeechEncoder);
    for part in wanted.iter().filter(|part| !is_optional(part)) {
        if !files.iter().any(|file| part.takes(&file.name) && is_weights(file)) {
            return Err(part.name().to_owned());
        }
    }
    let is_wanted = |file: &&RemoteFile| {
        ALWAYS.contains(&file.name.as_str()) || wanted.iter().any(|part| part.takes(&file.name))
    };
    let mut selected: Vec<RemoteFile> = files.iter().filter(is_wanted).cloned().collect();
    selected.sort_by(|a, b| (a.size, &a.name).cmp(&(b.size, &b.name)));
    Ok(selected)
}
