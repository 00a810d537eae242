//! Names of modules: official (the original checkpoints and ComfyUI), diffusers, kohya.
//!
//! Reading and writing of weights and adapters all use these functions; the names themselves are in
//! [`modules`](crate::dit::modules).

use crate::dit::LayerId;
use crate::dit::modules::{CHAINS, Chain, Module, OUTSIDE};

/// Splits `blocks.7.self_attn.q` into (layer 7 of the blocks, `self_attn.q`); `None` outside the layers.
pub fn split_layer(name: &str) -> Option<(LayerId, &str)> {
    split(name).map(|(chain, index, module)| (LayerId::new(chain.name, index), module))
}

/// The chain, the number in it and the name inside the layer.
fn split(name: &str) -> Option<(&'static Chain, usize, &str)> {
    CHAINS.iter().find_map(|chain| {
        let (index, module) = name.strip_prefix(chain.name)?.strip_prefix('.')?.split_once('.')?;
        Some((chain, index.parse().ok()?, module))
    })
}

/// The diffusers name of an official DiT module (`blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`).
pub fn module_to_diffusers(official: &str) -> Option<String> {
    renamed(official, |module| (module.official, module.diffusers))
}

/// The official name of a diffusers DiT module; the inverse of [`module_to_diffusers`].
pub fn module_from_diffusers(diffusers: &str) -> Option<String> {
    renamed(diffusers, |module| (module.diffusers, module.official))
}

/// `name` in the other layout; `layouts` returns a module's names in the source and the target layout.
fn renamed(name: &str, layouts: fn(&Module) -> (&'static str, &'static str)) -> Option<String> {
    let renamed = |module: &'static Module, name: &str| {
        let (from, to) = layouts(module);
        (from == name).then_some(to)
    };
    match split(name) {
        Some((chain, index, local)) => {
            let to = chain.modules().find_map(|module| renamed(module, local))?;
            Some(format!("{}.{index}.{to}", chain.name))
        }
        None => OUTSIDE.iter().find_map(|module| renamed(module, name)).map(str::to_owned),
    }
}

/// The diffusers name of an official DiT tensor: a module name, possibly followed by `.weight` or `.bias`.
pub fn tensor_to_diffusers(official: &str) -> Option<String> {
    with_suffix(official, module_to_diffusers)
}

/// The kohya form of an official module name: dots become underscores.
pub fn module_to_kohya(official: &str) -> String {
    official.replace('.', "_")
}

/// The official name of a kohya DiT module; the inverse of [`module_to_kohya`]. The names themselves contain
/// underscores, so it is looked up, not replaced.
pub fn module_from_kohya(kohya: &str) -> Option<String> {
    let named = |module: &'static Module, name: &str| {
        (module_to_kohya(module.official) == name).then_some(module.official)
    };
    let of_layer = |chain: &Chain| {
        let rest = kohya.strip_prefix(&module_to_kohya(chain.name))?.strip_prefix('_')?;
        let (index, module) = rest.split_once('_')?;
        let (index, module) =
            (index.parse::<usize>().ok()?, chain.modules().find_map(|own| named(own, module))?);
        Some(format!("{}.{index}.{module}", chain.name))
    };
    let outside = || OUTSIDE.iter().find_map(|module| named(module, kohya)).map(str::to_owned);
    CHAINS.iter().find_map(of_layer).or_else(outside)
}

fn with_suffix(name: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    for suffix in [".weight", ".bias"] {
        if let Some(module) = name.strip_suffix(suffix) {
            return map(module).map(|m| m + suffix);
        }
    }
    map(name)
}
