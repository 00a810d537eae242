//! Why an adapter file was refused, or could not be written.

use std::path::PathBuf;

/// Why an adapter file was refused. Every message names the file, the key, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdapterFileError {
    /// No key looks like an adapter's.
    #[error(
        "{path}: this is not an adapter: none of its {keys} tensors is named like a LoRA factor \
         (…lora_A.weight, …lora_down.weight)"
    )]
    NotAnAdapter {
        /// The file.
        path: PathBuf,
        /// How many tensors it holds.
        keys: usize,
    },
    /// Keys that would be lost silently.
    #[error("{path}: it has keys that are not understood ({count}), such as {}; {hint}", .examples.join(", "))]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first few.
        examples: Vec<String>,
        /// What they probably are.
        hint: &'static str,
    },
    /// One factor without the other, or an alpha without factors.
    #[error(
        "{path}: {module} has `{found}` but no {missing}; the file is incomplete, export or download it again"
    )]
    HalfPair {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// The key that was found.
        found: String,
        /// The missing one: "up factor (lora_B or lora_up)", or "down factor ...".
        missing: &'static str,
    },
    /// The same factor twice.
    #[error(
        "{path}: `{first}` and `{second}` are both for {module}; keep the adapters of two experts in two files"
    )]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// One key.
        first: String,
        /// The other.
        second: String,
    },
    /// Keys of both experts.
    #[error(
        "{path}: `{first}` is for the high-noise expert and `{second}` for the low-noise one; \
         keep the adapters of two experts in two files, one for each"
    )]
    MixedExperts {
        /// The file.
        path: PathBuf,
        /// A key of one.
        first: String,
        /// A key of the other.
        second: String,
    },
    /// Keys of two kinds of adapter on one module.
    #[error("{path}: {module} has the keys of two kinds of adapter ({}); keep them in two files", .keys.join(", "))]
    TwoKinds {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// Its keys.
        keys: Vec<String>,
    },
    /// Factors of a LoHa or a LoKr that do not multiply.
    #[error(
        "{path}: the factors of the {kind} of {module} have shapes {shapes:?}, which do not fit each other; \
         the file is damaged, export or download it again"
    )]
    Misfit {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// The kind.
        kind: &'static str,
        /// The shapes.
        shapes: Vec<Vec<usize>>,
    },
    /// DoRA's magnitudes whose number is not that of the rows.
    #[error(
        "{path}: `{key}` has shape {shape:?}; the lengths of a DoRA must be one for each of the {out} rows of its weight \
         (lengths of columns cannot be used)"
    )]
    NotLengths {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Rows of the weight.
        out: usize,
    },
    /// A folder without an adapter in it.
    #[error("{path}: there is no adapter in this folder; looked for {looked}")]
    NoFile {
        /// The folder.
        path: PathBuf,
        /// The names.
        looked: String,
    },
    /// A kind or a difference that the style cannot express.
    #[error("{path}: {what} of {module} cannot be written in this style; {way_out}")]
    NotInStyle {
        /// The file.
        path: PathBuf,
        /// Official module or tensor name.
        module: String,
        /// What it is.
        what: &'static str,
        /// What to do.
        way_out: &'static str,
    },
    /// A factor that is no matrix.
    #[error(
        "{path}: `{key}` has shape {shape:?}; only factors of Linear layers, which are matrices, can be used"
    )]
    NotAMatrix {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A and B do not multiply.
    #[error(
        "{path}: the factors of {module} do not fit each other: A is {a:?} and B is {b:?}, \
         but A must be [rank, in] and B [out, rank] with one rank above 0"
    )]
    RankMismatch {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// Shape of A.
        a: Vec<usize>,
        /// Shape of B.
        b: Vec<usize>,
    },
    /// An alpha of 0, which programs interpret differently, or one that is not a number.
    #[error(
        "{path}: `{key}` is {value}; alpha must be a finite number other than 0 (programs disagree about 0: \
         some read it as the rank, others as no effect)"
    )]
    Alpha {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: f32,
    },
    /// The PEFT settings cannot be read.
    #[error("{path}: the adapter settings in {place} cannot be read: {reason}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// The metadata key, or the file beside it.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing to write.
    #[error("{path}: there is nothing to write: the adapter has no modules")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A module that the style has no name for.
    #[error("{path}: {module} is not a module of the Wan transformer, so it has no name in this style")]
    NoName {
        /// The file.
        path: PathBuf,
        /// The module.
        module: String,
    },
    /// A value that the number format cannot hold.
    #[error(
        "{path}: a factor of {module} is not finite as {precision}; \
         if it was finite before, export as bfloat16 or float32"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// Official module name.
        module: String,
        /// The number format.
        precision: &'static str,
    },
    /// The file could not be written.
    #[error("{path}: cannot write: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file differs from the adapter when it is read back: a bug.
    #[error(
        "{path}: reading it back gave another adapter: {difference}; the file was not kept, please report this"
    )]
    Verification {
        /// The file.
        path: PathBuf,
        /// The module and how far it is off.
        difference: String,
    },
}
