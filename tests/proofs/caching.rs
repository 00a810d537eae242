//! What is encoded, and when: nothing is kept before it is needed, and no model is loaded for cached entries.

use data::{Cache, HostTensor, Key, Storage};
use kernels::ledger::Ledger;
use kernels::{DType, Device, Tensor};
use models::clip::Clip;
use models::vae::Vae;
use models::weights::Checkpoint;
use proofs::project::Project;
use proofs::{assert_same_bits, fixture, residents};
use trainer::base::{BaseModel, ModelConfig};
use trainer::encode::{Encoding, LatentStore};
use trainer::error::Error;
use trainer::learning::NoiseRange;
use trainer::machine::forecast::{Decoding, Networks};
use trainer::machine::precision::Processor;
use trainer::plan::{Plan, Planned};
use trainer::residents::{Residency, Residents, Setup, WhenIdle};
use trainer::train;
use trainer::train::batch::Batches;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// Samples of the held-out loss are prepared one by one: later ones are read later.
#[test]
fn held_out_samples_are_made_when_they_are_asked_for() {
    let captions = ["a ball", "two birds fly", "a fox"];
    let project = Project::new(&fixture(""), &captions, "held_out = [\"clip01*\", \"clip02*\"]");
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
    assert_eq!(batches.held_out(NoiseRange::All).count(), 18);
    let mut samples = batches.held_out(NoiseRange::All);
    let first: Vec<_> = samples.by_ref().take(9).map(|sample| sample.unwrap()).collect();
    assert!(first.iter().enumerate().all(|(level, sample)| sample.level == level));
    assert!(first.iter().all(|sample| sample.item.starts_with("clip01")));
    std::fs::remove_dir_all(project.cache()).unwrap();
    assert!(samples.next().unwrap().is_err(), "the second clip was read with the first");
}

/// A step that drives the adapter beyond all numbers is seen by the held-out loss behind it, which names clip and sigma; the
/// log has no row of it.
#[test]
fn a_held_out_loss_that_is_no_number_stops_the_run() {
    let settings = "held_out = [\"clip01*\"]\n[train]\nsteps = 1\n[optimizer]\nwarmup = 0\n";
    let project = Project::new(&fixture(""), &["a ball", "two birds fly"], settings);
    let mut planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    planned.plan.optimizer.lr = 1e30;
    let folder = train::RunFolder::begin(&mut planned.plan).unwrap();
    let ended = train::train(&planned, &folder, &Interrupt::default(), &Ui::new(Voice::Json));
    let Err(Error::NonFiniteHeldOut { step: 1, item, sigma }) = ended else { panic!("{ended:?}") };
    assert!(item.starts_with("clip01") && (0.0..1.0).contains(&sigma), "{item} at {sigma}");
    assert!(!std::fs::read_to_string(folder.metrics()).unwrap().contains("null"));
}

/// The model of a fixture in bfloat16, as on a GPU.
fn in_bfloat16() -> BaseModel {
    let named = ModelConfig { folder: Some(fixture("repo_official_a14b")), ..ModelConfig::default() };
    let mut model = named.settle("".as_ref(), Processor::Gpu).unwrap();
    model.expert = None;
    model
}

/// States that were computed in bfloat16 are stored in it, and come back bit for bit. Those that an older version stored in
/// f32 under the same key are taken as they are.
#[test]
fn text_states_are_stored_as_they_were_computed() {
    let (folder, model) = (tempfile::tempdir().unwrap(), in_bfloat16());
    let dit = model.dits.of(models::Expert::High).open().unwrap().0;
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let mut residents = residents(&model, &dit, Device::Cpu, &ui);
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    let encoded = LatentStore::open(folder.path(), &model).unwrap();
    let key = |prompt| Key::text(prompt, &model.text_identity().unwrap());

    let old = HostTensor::new(vec![2, 24], (0..48).map(|i| i as f32 * 0.1).collect()).unwrap();
    let cache = Cache::open(folder.path()).unwrap();
    cache.put(&key("an old one"), &[("text", &old, Storage::F32)], &Default::default()).unwrap();
    encoded.encode_prompts(["a fox", "an old one"], &mut with).unwrap();

    let text = encoded.text("an old one").unwrap();
    assert_same_bits("old", &text, &Tensor::from_vec(old.into_data(), (2, 24), &Device::Cpu).unwrap());
    let name = key("a fox").to_string();
    let path = folder.path().join(&name[..2]).join(format!("{name}.safetensors"));
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(file.dtype("text").unwrap().name(), "BF16");
    let encoder = model.load_text_encoder(&Device::Cpu).unwrap();
    let computed = encoder.encode_prompt("a fox").unwrap().to_dtype(DType::F32).unwrap();
    assert_same_bits("new", &encoded.text("a fox").unwrap(), &computed);
}

/// Clips are dealt out to the VAEs of all devices: every entry is there, of the same bytes as from one device, and both had work.
#[test]
fn clips_that_are_dealt_out_give_the_same_entries() {
    let captions = ["a ball", "two birds fly", "a fox", "a hill", "rain"];
    let project = Project::new(&fixture(""), &captions, "");
    let Planned { plan, dataset, dit, .. } = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let entries = |count: usize| {
        let folder = tempfile::tempdir().unwrap();
        let ledgers: Vec<Ledger> = (0..count).map(|_| Ledger::new(1)).collect();
        let stage = |(i, ledger): (usize, &Ledger)| (Device::counted_cpu(ledger.clone()), i..i + 1);
        let split = ledgers.iter().enumerate().map(stage).collect();
        let residency = Residency {
            networks: Networks::InTurn,
            decoding: Decoding::Alone,
            vae: WhenIdle::Drop,
            clip_groups: std::num::NonZeroUsize::MIN,
        };
        let setup = Setup { encoders: Some(count), ..Setup::default() };
        let mut residents = Residents::new((&plan.model, &dit), split, residency, setup, &ui);
        let mut encoded = LatentStore::open(folder.path(), &plan.model).unwrap();
        let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
        encoded.encode_clips(&dataset, &mut with).unwrap();
        assert!(ledgers.iter().all(|ledger| ledger.peak() > 0), "a device had nothing to do");
        let latents =
            |index| encoded.latents(index).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (0..dataset.windows.len()).map(latents).collect::<Vec<_>>()
    };
    let one = entries(1);
    assert!(one.len() >= 5 && one == entries(2) && one == entries(3));
}

/// Keys of entries use an encoder's identity from its files, which is that of the loaded one: older caches are found.
#[test]
fn encoders_are_known_by_their_files() {
    let parts = [("repo_diffusers_i2v21/vae", "repo_diffusers_i2v21/image_encoder")];
    for (vae, clip) in parts.map(|(vae, clip)| (fixture(vae), fixture(clip))) {
        let loaded = Vae::load(&vae, None, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(Vae::fingerprint_at(&vae, None).unwrap(), loaded.fingerprint());
        let loaded = Clip::load(&clip, None, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(Checkpoint::open(&clip).unwrap().fingerprint().unwrap(), loaded.fingerprint());
    }
    let official = fixture("repo_official_a14b/Wan2.1_VAE.pth");
    let loaded = Vae::load(&official, None, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(Vae::fingerprint_at(&official, None).unwrap(), loaded.fingerprint());
}
