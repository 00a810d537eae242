//! Which algorithms the GPUs' products take: found by the clock once, and kept with the run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kernels::{Device, device, inventory};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The choices of a run, for as long as its cards and cuBLASLt stay the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Products {
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
}
