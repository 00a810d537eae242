//! Which algorithms the GPUs' products take: found by the clock once, and kept with a run, and for clips with the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kernels::{Device, device, inventory};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The choices of a run, for as long as its cards and cuBLASLt stay the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Products {
    /// The version of cuBLASLt.
    library: String,
    /// Of each GPU: its product name, and the algorithm of each product.
    cards: Vec<(String, BTreeMap<String, usize>)>,
}

impl Products {
    /// What the GPUs of `devices` have chosen so far; nothing without GPUs.
    pub fn of<'a>(devices: impl Iterator<Item = &'a Device>) -> Option<Self> {
        let gpus = inventory::gpus().unwrap_or_default();
        let card = |device: &Device| {
            let name = gpus.get(gpu_index(device)?)?.name.clone();
            Some((name, device::product_choices(device)))
        };
        let cards: Vec<_> = devices.filter_map(card).collect();
        (!cards.is_empty()).then(|| Self { library: library(), cards })
    }

    /// Lets `devices` keep to the choices in the file at `path`, where it is there and of the same cards and library.
    ///
    /// # Errors
    /// A file that is there and cannot be read.
    pub fn keep<'a>(path: &Path, devices: impl Iterator<Item = &'a Device> + Clone) -> Result<()> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::Io { action: "read", path: path.to_owned(), source }),
        };
        // Damaged or of another version: what it holds can be found again.
        let (Ok(kept), Some(now)) = (serde_json::from_str::<Self>(&text), Self::of(devices.clone())) else {
            return Ok(());
        };
        if kept.is_of_the_machine_of(&now) {
            let gpus = devices.filter(|device| gpu_index(device).is_some());
            gpus.zip(kept.cards).for_each(|(device, (_, choices))| {
                device::keep_product_choices(device, choices);
            });
        }
        Ok(())
    }

    /// Whether the choices of both are of the same cards in the same order, and of one cuBLASLt: an index means another
    /// algorithm elsewhere.
    fn is_of_the_machine_of(&self, other: &Self) -> bool {
        let names = |products: &Self| products.cards.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        self.library == other.library && names(self) == names(other)
    }

    /// Writes the choices to `path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::PlanText { why: e.to_string() })?;
        data::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes()))
            .map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
    }
}

/// The choices of all cards that clips were sampled on, in a file of this machine.
#[derive(Debug)]
pub struct KnownProducts(PathBuf);

/// What is in the file: an algorithm's number means another one with other libraries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    /// The version of the driver.
    driver: String,
    /// The version of cuBLASLt.
    library: String,
    /// By the name of the card: the algorithm of each product.
    cards: BTreeMap<String, BTreeMap<String, usize>>,
}

impl KnownProducts {
    /// Those in the file at `path`, which need not be there.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Lets `devices` use what is known, so that they need not measure. A file that cannot be read, or is of other libraries, costs
    /// the measuring again.
    pub fn restore<'a>(&self, devices: impl Iterator<Item = &'a Device>) {
        let devices: Vec<&Device> = devices.filter(|device| gpu_index(device).is_some()).collect();
        let Some(now) = Products::of(devices.iter().copied()) else { return };
        let known = self.read().of(&driver(), &now.library);
        for (device, (name, _)) in devices.into_iter().zip(&now.cards) {
            if let Some(choices) = known.cards.get(name) {
                device::keep_product_choices(device, choices.clone());
            }
        }
    }

    /// Adds what `devices` have chosen since.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn store<'a>(&self, devices: impl Iterator<Item = &'a Device>) -> Result<()> {
        let Some(now) = Products::of(devices) else { return Ok(()) };
        let before = self.read();
        let after = before.clone().of(&driver(), &now.library).with(now.cards);
        if after == before {
            return Ok(());
        }
        let io = |source| Error::Io { action: "write", path: self.0.clone(), source };
        if let Some(folder) = self.0.parent() {
            fs::create_dir_all(folder).map_err(io)?;
        }
        let text =
            serde_json::to_string_pretty(&after).map_err(|e| Error::PlanText { why: e.to_string() })?;
        data::atomic::write(&self.0, |file| std::io::Write::write_all(file, text.as_bytes())).map_err(io)
    }

    fn read(&self) -> Known {
        let text = fs::read_to_string(&self.0).ok();
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }
}

impl Known {
    /// The same if it is of these versions, else nothing.
    fn of(self, driver: &str, library: &str) -> Self {
        match self.driver == driver && self.library == library {
            true => self,
            false => Self { driver: driver.to_owned(), library: library.to_owned(), cards: BTreeMap::new() },
        }
    }

    /// With more choices; those that are known stay.
    fn with(mut self, cards: Vec<(String, BTreeMap<String, usize>)>) -> Self {
        for (name, choices) in cards.into_iter().filter(|(_, choices)| !choices.is_empty()) {
            let known = self.cards.entry(name).or_default();
            choices.into_iter().for_each(|(product, choice)| {
                known.entry(product).or_insert(choice);
            });
        }
        self
    }
}

fn driver() -> String {
    inventory::driver().ok().and_then(|driver| driver.version).unwrap_or_default()
}

fn gpu_index(device: &Device) -> Option<usize> {
    match device.location() {
        kernels::DeviceLocation::Cuda { gpu_id } => Some(gpu_id),
        _ => None,
    }
}

fn library() -> String {
    let found = inventory::libraries().into_iter().find(|library| library.name == "cuBLASLt");
    found.and_then(|library| library.version.ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn products(library: &str, cards: &[&str]) -> Products {
        let card =
            |name: &&str| ((*name).to_owned(), BTreeMap::from([("bf16 1x1x1".to_owned(), cards.len())]));
        Products { library: library.to_owned(), cards: cards.iter().map(card).collect() }
    }

    #[test]
    fn choices_read_back_and_belong_to_their_cards_and_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("products.json");
        let kept = products("13.0", &["A", "B"]);
        kept.store(&path).unwrap();
        let back: Products = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(back, kept);
        assert!(back.is_of_the_machine_of(&products("13.0", &["A", "B"])));
        for other in [products("13.1", &["A", "B"]), products("13.0", &["B", "A"]), products("13.0", &["A"])]
        {
            assert!(!back.is_of_the_machine_of(&other), "{other:?}");
        }
        // A damaged file costs the measuring again; one that cannot be read is an error.
        fs::write(&path, "{").unwrap();
        Products::keep(&path, std::iter::empty()).unwrap();
        assert!(Products::keep(folder.path(), std::iter::empty()).is_err());
    }

    #[test]
    fn known_choices_are_of_one_card_and_of_one_version_of_the_libraries() {
        let of = |choice: usize| BTreeMap::from([("bf16 1x1x1".to_owned(), choice)]);
        let known = Known::default().of("580", "13.0").with(vec![("A".to_owned(), of(1))]);
        // Two cards of a kind may have measured otherwise; what was known first stays.
        let more = known.clone().with(vec![("A".to_owned(), of(2)), ("B".to_owned(), of(3))]);
        assert_eq!((&more.cards["A"], &more.cards["B"]), (&of(1), &of(3)));
        assert_eq!(known.clone().of("580", "13.0"), known);
        for (driver, library) in [("581", "13.0"), ("580", "13.1")] {
            assert!(more.clone().of(driver, library).cards.is_empty());
        }
        let folder = tempfile::tempdir().unwrap();
        let file = KnownProducts::at(folder.path().join("products.json"));
        assert_eq!(file.read(), Known::default());
        fs::write(&file.0, serde_json::to_string(&more).unwrap()).unwrap();
        assert_eq!(file.read(), more);
        fs::write(&file.0, "{\"driver\":").unwrap();
        assert_eq!(file.read(), Known::default());
        // Without a GPU there is nothing to write.
        file.store(std::iter::empty()).unwrap();
        assert_eq!(fs::read_to_string(&file.0).unwrap(), "{\"driver\":");
    }
}
