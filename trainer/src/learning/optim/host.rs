//! Copies of an optimiser's state in host memory, and the adapter file of such a copy.

use std::collections::BTreeMap;
use std::thread;

use kernels::optimiser::State;
use kernels::{Device, DeviceLocation, Tensor};
use models::adapter::files::AdapterFile;
use models::dit::Linear;

use super::{Saved, Shown};
use crate::error::Result;
use crate::pipeline::Pipeline;

/// A copy of `saved` in host memory, which later updates do not change. Each device is read by a thread of its own.
pub fn on_host(saved: &Saved) -> Result<Saved> {
    let mut by_device: Vec<(DeviceLocation, Vec<(&String, &State)>)> = Vec::new();
    for (name, state) in &saved.tensors {
        let place = state.parameter.device().location();
        match by_device.iter_mut().find(|(device, _)| *device == place) {
            Some((_, own)) => own.push((name, state)),
            None => by_device.push((place, vec![(name, state)])),
        }
    }
    let copy = |(name, state): &(&String, &State)| -> Result<(String, State)> {
        let slots = state.slots.iter().map(host_copy).collect::<kernels::Result<_>>()?;
        Ok(((*name).clone(), State { parameter: host_copy(&state.parameter)?, slots }))
    };
    let copied: Vec<Result<Vec<(String, State)>>> = thread::scope(|scope| {
        let own = by_device.iter().map(|(_, own)| scope.spawn(|| own.iter().map(copy).collect()));
        let own: Vec<_> = own.collect();
        own.into_iter().map(|own| own.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    let tensors = copied.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    Ok(Saved { tensors, ..saved.clone() })
}

/// A copy of `tensor` in unshared host memory.
fn host_copy(tensor: &Tensor) -> kernels::Result<Tensor> {
    match tensor.device() {
        Device::Cpu => tensor.copy(),
        _ => tensor.to_device(&Device::Cpu),
    }
}

/// The adapters that `pipeline` trains as the contents of a file: what `shown` is of `states`, copies of their states on the host,
/// whose memory the file shares.
///
/// # Errors
/// If the conversion of an adapter needs weights that are missing.
pub fn adapter_file(
    pipeline: &Pipeline,
    shown: Shown,
    states: &BTreeMap<String, State>,
) -> Result<AdapterFile> {
    let mut file = AdapterFile::default();
    for stage in pipeline.stages() {
        for (module, adapters) in stage.adapters.iter() {
            for adapter in adapters.iter().filter(|adapter| adapter.is_trainable()) {
                let own =
                    |name: &str| states.get(&format!("{module}.{name}")).map(|state| shown.of(state).clone());
                let mut delta = adapter.delta().clone();
                let change = match delta.wants_product() {
                    // What depends on the weight is computed here, on the weight's device.
                    true => {
                        if shown.is_another() {
                            delta = delta.to_device(&Device::Cpu)?;
                            delta.replace(own);
                            delta = delta.to_device(&stage.device)?;
                        }
                        let change = stage
                            .dit
                            .with_linear(module, |linear| delta.to_change(linear.map(Linear::weight)))?;
                        change.map(&mut |tensor| Ok(host_copy(tensor)?))?
                    }
                    false => {
                        delta.replace(own);
                        delta.to_change(None)?
                    }
                };
                file.modules.insert(module.to_owned(), change);
            }
        }
    }
    Ok(file)
}
