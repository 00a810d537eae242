//! How adapters begin: fresh ones leave the model alone, those from a file do what the file does.

use std::collections::BTreeMap;

use kernels::{Device, Tensor, loha};
use models::adapter::files::{AdapterFile, Precision, Style, write};
use models::adapter::{AdapterKind, Adapters, Change, LoraConfig, LoraPair, Rank, Target, resize};
use proofs::fixture;
use proofs::project::Project;
use proofs::small::{config, micro_batch, pipeline, velocities, weights};
use proofs::{Tolerance, assert_close, randn};
use trainer::adapters::beginning;
use trainer::plan::Plan;
use trainer::watch::ui::{Ui, Voice};

/// f32 rounding of two ways to the same numbers.
const SAME: Tolerance = Tolerance { absolute: 1e-5, relative: 1e-5 };

const KINDS: [AdapterKind; 4] = [AdapterKind::Lora, AdapterKind::Dora, AdapterKind::Loha, AdapterKind::Lokr];

fn cpu(name: &str, shape: (usize, usize)) -> Tensor {
    (randn(name, shape).to_device(&Device::Cpu).unwrap() * 0.3).unwrap()
}

fn lora(kind: AdapterKind, rank: usize) -> LoraConfig {
    LoraConfig { kind, rank: Some(rank), alpha: Some(3.0), ..LoraConfig::default() }
}

fn targets(kind: AdapterKind, rank: usize) -> (LoraConfig, Vec<Target>) {
    let lora = lora(kind, rank);
    let targets = lora.select(&config(2, 32).adaptable_modules()).unwrap();
    (lora, targets)
}

/// What a file of `change` for every target begins as.
fn begun(
    kind: AdapterKind,
    rank: usize,
    change: &dyn Fn(&Target) -> Change,
) -> models::Result<(Adapters, Vec<String>)> {
    let (lora, targets) = targets(kind, rank);
    let modules: BTreeMap<String, Change> = targets.iter().map(|t| (t.module.clone(), change(t))).collect();
    let file = AdapterFile { modules, ..Default::default() };
    Adapters::begun(&targets, &lora, &file, 5, &Device::Cpu)
}

fn pair(target: &Target, rank: usize) -> LoraPair {
    let name = |part: &str| format!("{}.{part}", target.module);
    LoraPair::new(cpu(&name("a"), (rank, target.input)), cpu(&name("b"), (target.out, rank)), 0.7).unwrap()
}

/// The delta of the first adapter of `module`.
fn delta(adapters: &Adapters, module: &str) -> Tensor {
    adapters.of(module)[0].delta().to_change(None).unwrap().delta().unwrap().unwrap()
}

#[test]
fn fresh_adapters_of_every_kind_leave_the_model_alone_and_count_as_planned() {
    let dit = config(2, 32);
    let inputs = [micro_batch("fresh", 1, 7, None).input];
    let plain = velocities(&pipeline(&dit, &weights(&dit), &Adapters::default(), &[2]), &inputs).remove(0);
    for kind in KINDS {
        let (lora, targets) = targets(kind, 2);
        let fresh = Adapters::fresh(&targets, &lora, 5, &Device::Cpu).unwrap();
        let model = pipeline(&dit, &weights(&dit), &fresh, &[1, 1]);
        assert_close(kind.name(), &velocities(&model, &inputs)[0], &plain, SAME);
        let parameters: usize = model
            .stages()
            .iter()
            .flat_map(|stage| stage.adapters.parameters().into_values())
            .map(|tensor| tensor.elem_count())
            .sum();
        let planned: usize = targets.iter().map(|t| lora.numbers(t.out, t.input)).sum();
        assert_eq!(parameters, planned, "{}", kind.name());
    }
}

#[test]
fn a_run_begins_with_what_the_file_does() {
    for rank in [3, 5] {
        let (adapters, told) = begun(AdapterKind::Lora, rank, &|target| pair(target, 3).into()).unwrap();
        let (_, targets) = targets(AdapterKind::Lora, rank);
        for target in &targets {
            let what = format!("rank 3 to {rank}: {}", target.module);
            assert_close(&what, &delta(&adapters, &target.module), &pair(target, 3).delta().unwrap(), SAME);
            let change = adapters.of(&target.module)[0].delta().to_change(None).unwrap();
            assert_eq!(change.rank(), Some(rank));
            // Rows that are all zero would never learn.
            let rows = change.pair().unwrap().a.abs().unwrap().min(1).unwrap();
            let smallest: f32 = rows.min_all().unwrap().to_scalar().unwrap();
            assert!(smallest > 0.0, "{what}: a row of zeros");
        }
        assert_eq!(told.len(), if rank == 3 { 1 } else { 2 }, "{told:?}");
    }
    let (adapters, told) = begun(AdapterKind::Lora, 2, &|target| pair(target, 3).into()).unwrap();
    let module = "blocks.1.ffn.0";
    let target = Target { module: module.to_owned(), out: 40, input: 32 };
    let best = resize(&pair(&target, 3).into(), Rank::Fixed(2), 1).unwrap();
    assert_close("rank 3 to 2", &delta(&adapters, module), &best.pair.delta().unwrap(), SAME);
    assert!(told.iter().any(|line| line.contains("from rank 3 to rank 2 by singular values")), "{told:?}");

    let loha = |target: &Target| {
        let name = |part: &str| format!("{}.{part}", target.module);
        Change::Loha(loha::Factors {
            w1_a: cpu(&name("1a"), (target.out, 2)),
            w1_b: cpu(&name("1b"), (2, target.input)),
            w2_a: cpu(&name("2a"), (target.out, 2)),
            w2_b: cpu(&name("2b"), (2, target.input)),
            scale: 0.4,
        })
    };
    for (kind, rank) in [(AdapterKind::Loha, 2), (AdapterKind::Lora, 4)] {
        let (adapters, _) = begun(kind, rank, &loha).unwrap();
        let expected = loha(&target).delta().unwrap().unwrap();
        assert_close(&format!("LoHa to {}", kind.name()), &delta(&adapters, module), &expected, SAME);
    }
    // The next run starts from what one run trained: fresh adapters, moved away from zero.
    let (lora, targets) = targets(AdapterKind::Lokr, 2);
    let fresh = Adapters::fresh(&targets, &lora, 9, &Device::Cpu).unwrap();
    let moved: BTreeMap<String, Tensor> =
        fresh.parameters().into_iter().map(|(name, t)| (name, (t + 0.1).unwrap())).collect();
    let mut earlier = fresh;
    earlier.set_parameters(&moved);
    let change = |target: &Target| earlier.of(&target.module)[0].delta().to_change(None).unwrap();
    let (adapters, _) = begun(AdapterKind::Lokr, 2, &change).unwrap();
    assert_close("LoKr", &delta(&adapters, module), &delta(&earlier, module), SAME);
}

#[test]
fn what_cannot_be_begun_with_is_refused_by_name() {
    let refused = |kind: AdapterKind, rank: usize, change: &dyn Fn(&Target) -> Change| {
        begun(kind, rank, change).unwrap_err().to_string()
    };
    let text = refused(AdapterKind::Lokr, 2, &|target| pair(target, 3).into());
    assert!(text.contains("LoKr") && text.contains("blocks.0."), "{text}");
    let wide = |target: &Target| pair(&Target { input: target.input + 1, ..target.clone() }, 3).into();
    let text = refused(AdapterKind::Lora, 3, &wide);
    assert!(text.contains("another model") && text.contains("33"), "{text}");

    let (lora, mut targets) = targets(AdapterKind::Lora, 3);
    let modules: BTreeMap<String, Change> =
        targets.iter().map(|t| (t.module.clone(), pair(t, 3).into())).collect();
    let mut file = AdapterFile { modules, ..Default::default() };
    let left = targets.pop().unwrap().module;
    let text = Adapters::begun(&targets, &lora, &file, 5, &Device::Cpu).unwrap_err().to_string();
    assert!(text.contains(&left) && text.contains("adapter.targets"), "{text}");
    file.differences.insert("blocks.0.norm3.bias".to_owned(), cpu("d", (1, 32)));
    let text = Adapters::begun(&targets, &lora, &file, 5, &Device::Cpu).unwrap_err().to_string();
    assert!(text.contains("blocks.0.norm3.bias") && text.contains("tandem merge"), "{text}");
}

/// Errors that the header of a file shows are reported by the plan, with the key and the file; others when it is read.
#[test]
fn a_file_that_a_run_cannot_begin_with_is_refused_by_its_name_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("style.safetensors");
    let written = |module: &str, input: usize| {
        let target = Target { module: module.to_owned(), out: 40, input };
        let modules = BTreeMap::from([(module.to_owned(), pair(&target, 3).into())]);
        let file = AdapterFile { modules, ..Default::default() };
        write(&path, &file, Style::Comfy, Precision::Float32).unwrap();
    };
    let plan = |settings: &str| {
        let project =
            Project::new(&fixture(""), &["a ball"], &settings.replace("FILE", path.to_str().unwrap()));
        Plan::make(&project.recipe(), &mut |_, _| {})
    };
    let (begin, clips) = ("[adapter]\ninit_from = \"FILE\"\n", "[sample]\nadapter = \"FILE\"\n");
    let lokr = format!("{begin}kind = \"lokr\"\n");
    for (module, input, settings, told) in [
        ("blocks.0.ffn.0", 33, begin, ["adapter.init_from:", "40 x 33", "another model"]),
        ("blocks.0.ffn.0", 33, clips, ["sample.adapter:", "40 x 33", "another model"]),
        ("blocks.7.ffn.0", 32, begin, ["adapter.init_from:", "blocks.7.ffn.0", "adapter.targets"]),
        ("blocks.0.ffn.0", 32, &lokr, ["adapter.init_from:", "LoRA (rank 3)", "LoKr"]),
    ] {
        written(module, input);
        let error = plan(settings).unwrap_err().to_string();
        let lacking = told.iter().chain(&["style.safetensors"]).find(|words| !error.contains(**words));
        assert_eq!(lacking, None, "{error}");
    }
    written("blocks.0.ffn.0", 32);
    assert!(plan(begin).is_ok() && plan(clips).is_ok());

    let (lora, mut targets) = targets(AdapterKind::Lora, 3);
    targets.retain(|target| target.module != "blocks.0.ffn.0");
    let lora = LoraConfig { init_from_low: Some(path.clone()), ..lora };
    let error = beginning(&lora, Some(&path), &targets, 5, &Ui::new(Voice::Json)).unwrap_err().to_string();
    assert!(error.contains("adapter.init_from_low") && error.contains("style.safetensors"), "{error}");
}
