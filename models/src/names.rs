//! Names of modules: official (the original checkpoints and ComfyUI), diffusers, kohya.
//!
//! Reading and writing of weights and adapters all use these functions; the names themselves are in
//! [`modules`](crate::dit::modules).

use crate::dit::LayerId;
use crate::dit::animate::{DIRECTIONS, motion_to_diffusers};
use crate::dit::modules::{CHAINS, Chain, JOINED, Module, OUTSIDE};

/// Splits `blocks.7.self_attn.q` into (layer 7 of the blocks, `self_attn.q`); `None` outside the layers.
pub fn split_layer(name: &str) -> Option<(LayerId, &str)> {
    split(name).map(|(chain, index, module)| (LayerId::new(chain.name, index), module))
}

/// A layout's names of a chain and of a module.
#[derive(Clone, Copy)]
struct Layout {
    chain: fn(&Chain) -> &'static str,
    module: fn(&Module) -> &'static str,
}

const OFFICIAL: Layout = Layout { chain: |chain| chain.name, module: |module| module.official };
const DIFFUSERS: Layout = Layout { chain: |chain| chain.diffusers, module: |module| module.diffusers };

/// The chain, the number in it and the name inside the layer, of an official name.
fn split(name: &str) -> Option<(&'static Chain, usize, &str)> {
    split_in(name, OFFICIAL)
}

fn split_in(name: &str, layout: Layout) -> Option<(&'static Chain, usize, &str)> {
    CHAINS.iter().find_map(|chain| {
        let (index, module) = name.strip_prefix((layout.chain)(chain))?.strip_prefix('.')?.split_once('.')?;
        Some((chain, index.parse().ok()?, module))
    })
}

/// The diffusers name of an official DiT module (`blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`).
pub fn module_to_diffusers(official: &str) -> Option<String> {
    renamed(official, OFFICIAL, DIFFUSERS).or_else(|| motion_to_diffusers(official))
}

/// The official name of a diffusers DiT module; the inverse of [`module_to_diffusers`].
pub fn module_from_diffusers(diffusers: &str) -> Option<String> {
    renamed(diffusers, DIFFUSERS, OFFICIAL)
}

/// `name`, which is of the layout `from`, in the layout `to`.
fn renamed(name: &str, from: Layout, to: Layout) -> Option<String> {
    let renamed =
        |module: &'static Module, name: &str| ((from.module)(module) == name).then_some((to.module)(module));
    match split_in(name, from) {
        Some((chain, index, local)) => {
            let module = chain.modules().find_map(|module| renamed(module, local))?;
            Some(format!("{}.{index}.{module}", (to.chain)(chain)))
        }
        None => OUTSIDE.iter().find_map(|module| renamed(module, name)).map(str::to_owned),
    }
}

/// The diffusers name of an official DiT tensor: a module name, possibly followed by `.weight` or `.bias`.
pub fn tensor_to_diffusers(official: &str) -> Option<String> {
    let (directions, of_diffusers) = DIRECTIONS;
    if official == directions {
        return Some(of_diffusers.to_owned());
    }
    with_suffix(official, module_to_diffusers)
}

/// The tensors of a diffusers file whose rows are those of one official tensor: (its name, theirs, in their order).
pub(crate) fn joined_from_diffusers(blocks: usize) -> impl Iterator<Item = (String, [String; 2])> {
    let (official, parts) = JOINED;
    let chain = CHAINS.iter().find(|chain| chain.modules().any(|module| module.official == official));
    let layers =
        move |chain: &'static Chain| (0..blocks).map(move |index| format!("{}.{index}", chain.diffusers));
    let ends = |layer: String| [".weight", ".bias"].map(|end| (layer.clone(), end));
    chain.into_iter().flat_map(layers).flat_map(ends).map(move |(layer, end)| {
        (format!("{layer}.{official}{end}"), parts.map(|part| format!("{layer}.{part}{end}")))
    })
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
