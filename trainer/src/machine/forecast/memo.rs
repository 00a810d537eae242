//! Layers of shadows that are played once: a model's blocks are alike, and so is what they do to a ledger.
//!
//! The first of the layers that are alike goes through the model's own code, and is watched: what it held at its peak, what
//! it left, and what that shares memory with. The others leave the same. Layers that change side streams are not remembered:
//! each goes through its own code. A proof holds steps with and without this together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kernels::ledger::Trace;
use kernels::replay::{Mould, Player, Recorder, Taken};
use kernels::{Device, Tensor};
use models::dit::{Context, Gradients, Keep, Layer, LayerId, Linear, Pass, Saved, Streams};
use models::weights::{Frozen, Weights};

use crate::pipeline::Stage;

/// What is known of layers, for one task on one kind of device.
#[derive(Debug, Clone, Default)]
pub(super) struct Memo(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// Layers of a chain are alike where their adapters have tensors of the same names, behind the layer's own, and shapes; the place
    /// here stands for them.
    alike: Vec<Vec<(String, Vec<usize>)>>,
    forwards: HashMap<ForwardKey, Arc<Forward>>,
    backwards: HashMap<BackwardKey, Arc<Backward>>,
}

/// A place in [`Known::alike`].
type Alike = usize;

/// What a layer's forward depends on: what is kept, the bound on the feed-forward layer's tokens, and whether its adapters are off, whose
/// products are scaled.
type ForwardKey = (Alike, Keep, usize, bool);

/// What its backward depends on: that bound, bytes and gaplessness of what was kept, and whether gradients are there already.
type BackwardKey = (Alike, usize, Vec<(u64, bool)>, bool);

/// A layer's forward.
#[derive(Debug)]
struct Forward {
    trace: Trace,
    taken: Taken,
    main: Mould,
    saved: Saved<Mould>,
}

/// A layer's backward.
#[derive(Debug)]
struct Backward {
    trace: Trace,
    taken: Taken,
    main: Mould,
    /// In the order of the trained tensors.
    gradients: Vec<Mould>,
}

/// A layer that is played by what is known of those like it.
#[derive(Debug)]
struct Remembered {
    inner: Box<dyn Layer>,
    device: Device,
    memo: Memo,
    alike: Alike,
    /// The names of its trained tensors.
    trained: Vec<String>,
}

impl Memo {
    /// Lets the layers of `stage`, on a counted device of shadows, be played by what is known.
    pub fn remember(&self, stage: &mut Stage) {
        let (adapters, parameters) = (&stage.adapters, stage.adapters.parameters());
        let device = stage.device.clone();
        let remembered = |inner: Box<dyn Layer>| -> Box<dyn Layer> {
            let id = inner.id();
            let own = parameters.keys().filter(|name| id.local(name).is_some());
            let trained = own.cloned().collect();
            let here = adapters.iter().filter_map(|(module, all)| Some((id.local(module)?, all)));
            let tensors = here.flat_map(|(module, all)| {
                let tensors = all.iter().flat_map(|adapter| adapter.delta().tensors());
                tensors.map(move |(name, x)| (format!("{module}.{name}"), x.dims().to_vec()))
            });
            let alike = std::iter::once((id.chain().to_owned(), Vec::new())).chain(tensors).collect();
            let alike = self.known(|known| known.place(alike));
            Box::new(Remembered { inner, device: device.clone(), memo: self.clone(), alike, trained })
        };
        stage.dit.layers = std::mem::take(&mut stage.dit.layers).into_iter().map(remembered).collect();
    }

    fn known<T>(&self, look: impl FnOnce(&mut Known) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Known {
    fn place(&mut self, tensors: Vec<(String, Vec<usize>)>) -> Alike {
        self.alike.iter().position(|other| *other == tensors).unwrap_or_else(|| {
            self.alike.push(tensors);
            self.alike.len() - 1
        })
    }
}

impl Remembered {
    fn traced<T>(&self, work: impl FnOnce() -> T) -> (T, Trace) {
        match self.device.ledger() {
            Some(ledger) => ledger.traced(work),
            None => (work(), Trace::default()),
        }
    }

    fn replay(&self, trace: &Trace) {
        if let Some(ledger) = self.device.ledger() {
            ledger.replay(trace);
        }
    }
}

/// The side streams before a layer, without their memory.
struct Sides {
    names: Vec<&'static str>,
    recorder: Recorder,
}

impl Sides {
    fn of(streams: &Streams) -> Self {
        let names = streams.sides().map(|(name, _)| name).collect();
        Self { names, recorder: Recorder::new(streams.sides().map(|(_, side)| side)) }
    }

    /// Whether the layer let them pass by.
    fn are_those_of(&self, behind: &Streams) -> bool {
        let names = behind.sides().map(|(name, _)| name);
        names.eq(self.names.iter().copied())
            && behind.sides().enumerate().all(|(index, (_, side))| self.recorder.is_given(index, side))
    }
}

impl Layer for Remembered {
    fn id(&self) -> LayerId {
        self.inner.id()
    }

    fn forward(
        &self,
        mut streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> models::Result<(Streams, Saved)> {
        let mut linears = self.inner.linears().into_iter();
        let is_off = linears.any(|one| pass.adapters.of(one.name()).iter().any(|own| own.delta().is_off()));
        let key = (self.alike, keep, pass.ffn_tokens, is_off);
        let x = streams.main.clone();
        if let Some(known) = self.memo.known(|known| known.forwards.get(&key).cloned()) {
            self.replay(&known.trace);
            let player = Player::new([&x], &known.taken, &self.device);
            streams.main = player.play(&known.main);
            let saved = known.saved.clone().map(&mut |mould| Ok(player.play(&mould)))?;
            return Ok((streams, saved));
        }
        let sides = Sides::of(&streams);
        let mut recorder = Recorder::new([&x]);
        drop(x);
        let (result, trace) = self.traced(|| self.inner.forward(streams, context, pass, keep));
        let (behind, saved) = result?;
        if !sides.are_those_of(&behind) {
            return Ok((behind, saved));
        }
        let main = recorder.record(&behind.main);
        let moulds = saved.clone().map(&mut |x| Ok(recorder.record(&x)))?;
        let forward = Forward { trace, taken: recorder.taken(), main, saved: moulds };
        self.memo.known(|known| known.forwards.insert(key, forward.into()));
        Ok((behind, saved))
    }

    fn backward(
        &self,
        saved: Saved,
        mut d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> models::Result<Streams> {
        let mut kept = Vec::new();
        let saved = saved.map(&mut |x: Tensor| {
            kept.push((x.counted_bytes(), x.is_contiguous()));
            Ok(x)
        })?;
        let is_summed = self.trained.first().is_some_and(|name| gradients.get(name).is_some());
        let key = (self.alike, pass.ffn_tokens, kept, is_summed);
        if let Some(known) = self.memo.known(|known| known.backwards.get(&key).cloned()) {
            self.replay(&known.trace);
            let player = Player::new([&d_streams.main], &known.taken, &self.device);
            if !is_summed {
                for (name, mould) in self.trained.iter().zip(&known.gradients) {
                    gradients.add(name.clone(), player.play(mould))?;
                }
            }
            d_streams.main = player.play(&known.main);
            return Ok(d_streams);
        }
        let sides = Sides::of(&d_streams);
        let mut recorder = Recorder::new([&d_streams.main]);
        let (result, trace) = self.traced(|| self.inner.backward(saved, d_streams, context, pass, gradients));
        let behind = result?;
        if !sides.are_those_of(&behind) {
            return Ok(behind);
        }
        let main = recorder.record(&behind.main);
        let found = self.trained.iter().filter_map(|name| gradients.get(name));
        // Sums take the place of those that were there.
        let moulds = if is_summed { Vec::new() } else { found.map(|x| recorder.record(x)).collect() };
        let backward = Backward { trace, taken: recorder.taken(), main, gradients: moulds };
        self.memo.known(|known| known.backwards.insert(key, backward.into()));
        Ok(behind)
    }

    fn linears(&self) -> Vec<&Linear> {
        self.inner.linears()
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        self.inner.matrices_mut()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.inner.tensors_mut()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(Self {
            inner: self.inner.share(),
            device: self.device.clone(),
            memo: self.memo.clone(),
            alike: self.alike,
            trained: self.trained.clone(),
        })
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> models::Result<()> {
        self.inner.reload(weights, changed, frozen)
    }
}
