//! Who works on which devices: runs that train, and the models that make clips. A device serves one of them at a time.
//!
//! Clips wait while a run trains on one of their devices. A run that is queued goes before clips that wait, and the models that
//! made clips leave the devices before it starts.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The devices and who has them.
#[derive(Debug, Default)]
pub(super) struct Cards(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    /// Runs that train, with their devices.
    training: BTreeMap<String, Vec<String>>,
    /// Runs that would train, if models for clips were not there.
    coming: BTreeMap<String, Vec<String>>,
    /// The devices of the models for clips, whether they work or not.
    clips: Vec<String>,
}

fn meet(a: &[String], b: &[String]) -> bool {
    a.iter().any(|device| b.contains(device))
}

impl Cards {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Each change is made whole before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which runs train.
    pub fn set_training(&self, training: BTreeMap<String, Vec<String>>) {
        self.taken().training = training;
    }

    /// Gives `devices` to the run `name`.
    ///
    /// # Errors
    /// Who has them.
    pub fn give(&self, name: &str, devices: &[String]) -> Result<(), String> {
        let mut taken = self.taken();
        if let Some((other, _)) = taken.training.iter().find(|(_, others)| meet(others, devices)) {
            return Err(format!("{other} trains on {}", devices.join(" + ")));
        }
        if meet(&taken.clips, devices) {
            taken.coming.insert(name.to_owned(), devices.to_vec());
            return Err("a clip is being made there".to_owned());
        }
        taken.coming.remove(name);
        taken.training.insert(name.to_owned(), devices.to_vec());
        Ok(())
    }

    /// The run `name` does not want any devices now.
    pub fn forget(&self, name: &str) {
        self.taken().coming.remove(name);
    }

    /// Gives `devices` to the models for clips.
    ///
    /// # Errors
    /// What the clips wait for.
    pub fn give_to_clips(&self, devices: &[String]) -> Result<(), String> {
        let mut taken = self.taken();
        if let Some((run, _)) = taken.training.iter().find(|(_, others)| meet(others, devices)) {
            return Err(format!(
                "{run} trains on {}; clips are made when it ends or is paused",
                devices.join(" + ")
            ));
        }
        if let Some((run, _)) = taken.coming.iter().find(|(_, others)| meet(others, devices)) {
            return Err(format!("{run} is about to train on {}", devices.join(" + ")));
        }
        taken.clips = devices.to_vec();
        Ok(())
    }

    /// Whether a run waits for the devices of the models for clips.
    pub fn is_wanted(&self) -> bool {
        let taken = self.taken();
        taken.coming.values().any(|devices| meet(devices, &taken.clips))
    }

    /// The models for clips have left.
    pub fn take_from_clips(&self) {
        self.taken().clips.clear();
    }
}
