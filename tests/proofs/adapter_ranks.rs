//! Ranks and alphas of modules by pattern: trained, written in every format, read back, forecast.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kernels::{DType, Tensor};
use models::adapter::files::{AdapterFile, read};
use models::adapter::{AdapterKind, Adapters, LoraConfig};
use proofs::project::Project;
use proofs::small::config;
use proofs::{Tolerance, assert_close, device, fixture};
use trainer::machine::forecast::Task;
use trainer::plan::{Plan, Planned};
use trainer::train::{self, RunFolder};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

use crate::shadow::{PLANS, assert_shadow, task};

const RANKS: &str = "[adapter]\nrank = 4\nrank_by_module = { \"ffn.*\" = 2, \"blocks.0.self_attn.*\" = 6 }\n\
                     alpha_by_module = { \"cross_attn.q\" = 1.0 }\n";
/// What a module has by [`RANKS`]: rank and alpha.
fn expected(module: &str) -> (usize, f64) {
    match module {
        _ if module.contains(".ffn.") => (2, 2.0),
        _ if module.starts_with("blocks.0.self_attn.") => (6, 6.0),
        _ if module.ends_with("cross_attn.q") => (4, 1.0),
        _ => (4, 4.0),
    }
}

fn run(settings: &str) -> (Project, Planned) {
    let project = Project::new(&fixture(""), &["a ball", "two birds"], settings);
    let mut planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let folder = RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &folder, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    (project, planned)
}

fn exported(project: &Project) -> BTreeMap<String, AdapterFile> {
    let files = std::fs::read_dir(project.run().join("adapters")).unwrap();
    let paths: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), read(path).unwrap())).collect()
}

/// Every format says the same: the factors of each module have its rank, and what they add has its scale.
#[test]
fn modules_have_their_own_ranks_and_alphas_in_every_format() {
    let settings = format!(
        "{RANKS}[train]\nsteps = 3\n[optimizer]\nlr = 0.01\nwarmup = 0\nnorm_limit = 0.02\n\
         [export]\nformats = [\"comfy\", \"comfy-alpha\", \"diffusers\", \"peft\", \"kohya\"]\nprecision = \"float32\"\n"
    );
    let (project, planned) = run(&settings);
    let files = exported(&project);
    assert_eq!(files.len(), 5, "{:?}", files.keys());
    let delta = |file: &AdapterFile, module: &str| -> Tensor {
        let pair = file.modules[module].pair().unwrap();
        (pair.b.matmul(&pair.a).unwrap() * pair.scale()).unwrap().to_dtype(DType::F32).unwrap()
    };
    let (_, first) = files.first_key_value().unwrap();
    for target in &planned.targets {
        let module = target.module.as_str();
        let (rank, alpha) = expected(module);
        for (name, file) in &files {
            let pair = file.modules[module].pair().unwrap();
            assert_eq!(pair.rank(), rank, "{name}: {module}");
            if name.contains("alpha") || name.contains("kohya") {
                assert_eq!(pair.alpha.map(f64::from), Some(alpha), "{name}: {module}");
            }
            let tolerance = Tolerance { absolute: 1e-8, relative: 1e-6 };
            assert_close(
                &format!("{name}: {module}"),
                &delta(file, module),
                &delta(first, module),
                tolerance,
            );
        }
        // The limit is of the change, whatever its alpha.
        let norm: f32 = delta(first, module).sqr().unwrap().sum_all().unwrap().to_scalar().unwrap();
        let norm = f64::from(norm).sqrt();
        assert!(norm > 0.0 && norm < 0.02 * 1.0001, "{module}: a change of {norm}");
    }
    // The next run begins with it: as it is, and with each module resized to its own rank.
    for (settings, resized) in [(RANKS, false), ("[adapter]\nrank = 4\n", true)] {
        let lora: LoraConfig = toml::from_str(&settings.replace("[adapter]\n", "")).unwrap();
        let (begun, told) = Adapters::begun(&planned.targets, &lora, first, 0, &device()).unwrap();
        assert_eq!(told.iter().any(|line| line.contains("from rank 2 to rank 4")), resized, "{told:?}");
        let one = &begun.of("blocks.1.ffn.0")[0];
        assert_eq!(one.delta().plain().unwrap().a.dim(0).unwrap(), if resized { 4 } else { 2 });
    }
}

/// The plan plays each module at its own rank.
#[test]
fn a_shadow_of_ranks_by_module_takes_what_they_take() {
    let dit = config(3, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let ranks: BTreeMap<String, usize> =
        [("ffn.*", 7), ("blocks.1.*_attn.*", 3)].map(|(pattern, rank)| (pattern.to_owned(), rank)).into();
    for kind in [AdapterKind::Lora, AdapterKind::Loha] {
        let plain = Task { kind, ..task(&dit, &targets) };
        let task = Task { ranks: ranks.clone(), ..plain };
        assert_shadow(&format!("{kind:?} by module"), &task, [PLANS[0], PLANS[2]], 5);
    }
}

#[test]
fn ranks_that_cannot_be_are_refused_by_name() {
    for (settings, words) in [
        ("rank_by_module = { \"fnn.*\" = 2 }", "\"fnn.*\" names no module"),
        (
            "rank_by_module = { \"ffn.*\" = 2, \"blocks.0.*\" = 4 }",
            "both name blocks.0.ffn.0, which can have one rank",
        ),
        ("alpha_by_module = { \"*.q\" = 2.0, \"self_attn.*\" = 4.0 }", "which can have one alpha"),
        ("rank_by_module = { \"ffn.*\" = 0 }", "adapter.rank_by_module"),
        ("rank_by_module = { \"ffn.*\" = 100000 }", "adapter.rank_by_module"),
        ("alpha_by_module = { \"ffn.*\" = -1.0 }", "adapter.alpha_by_module"),
    ] {
        let project = Project::new(&fixture(""), &["a ball"], &format!("[adapter]\n{settings}\n"));
        let error = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{settings}: {error}");
    }
}
