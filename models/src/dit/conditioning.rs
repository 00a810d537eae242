//! What the network is conditioned on: one collection of tensors by role.
//!
//! Whatever places, sends, parks or stacks conditioning does it through [`Conditioning::try_map`] and the properties of
//! the [`Role`], so a new role concerns the encoder that makes it and the model that reads it, and nothing in between.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use kernels::{Device, Tensor};

use super::role::{Residence, Role, Rows};
use crate::{Error, Result};

/// Marks conditioning as encoders make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raw;

/// Marks conditioning behind the model's embeddings, as layers read it. It crosses the boundaries between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embedded;

/// Things of type `T` by role, [`Raw`] or [`Embedded`].
#[derive(Debug, Clone)]
pub struct Conditioning<S, T = Tensor> {
    by_role: BTreeMap<Role, T>,
    state: PhantomData<S>,
}

impl<S, T> Default for Conditioning<S, T> {
    fn default() -> Self {
        Self { by_role: BTreeMap::new(), state: PhantomData }
    }
}

impl<S, T> Conditioning<S, T> {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with `value` as `role`, in place of what was there.
    pub fn with(mut self, role: Role, value: T) -> Self {
        self.insert(role, value);
        self
    }

    /// [`Self::with`] where there is a value.
    pub fn with_optional(self, role: Role, value: Option<T>) -> Self {
        match value {
            Some(value) => self.with(role, value),
            None => self,
        }
    }

    /// All roles of both; `other` wins where a role is in both.
    pub fn merged(mut self, other: Self) -> Self {
        self.by_role.extend(other.by_role);
        self
    }

    /// Puts `value` in as `role`, in place of what was there.
    pub fn insert(&mut self, role: Role, value: T) {
        self.by_role.insert(role, value);
    }

    /// Takes out what is there as `role`: for embeddings that read a role of their own and hand on the rest.
    pub fn take(&mut self, role: Role) -> Option<T> {
        self.by_role.remove(&role)
    }

    /// What is there as `role`.
    pub fn get(&self, role: Role) -> Option<&T> {
        self.by_role.get(&role)
    }

    /// What is there as `role`, which the model reads.
    ///
    /// # Errors
    /// [`Error::RoleMissing`] when it is not there.
    pub fn require(&self, role: Role) -> Result<&T> {
        self.get(role).ok_or(Error::RoleMissing { role })
    }

    /// Checks that every role here is one of `known`.
    ///
    /// # Errors
    /// [`Error::RoleUnread`] naming the first that is not: conditioning that nothing reads is a mistake of the caller.
    pub fn check_known(&self, known: &[Role]) -> Result<()> {
        match self.by_role.keys().find(|role| !known.contains(role)) {
            Some(&role) => Err(Error::RoleUnread { role }),
            None => Ok(()),
        }
    }

    /// Roles and values, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (Role, &T)> {
        self.by_role.iter().map(|(role, value)| (*role, value))
    }

    /// Every value through `f`.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Conditioning<S, U> {
        let by_role = self.by_role.into_iter().map(|(role, value)| (role, f(value))).collect();
        Conditioning { by_role, state: PhantomData }
    }

    /// Every value through `f`, ordered by name.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(self, mut f: impl FnMut(Role, T) -> Result<U, E>) -> Result<Conditioning<S, U>, E> {
        let mapped = self.by_role.into_iter().map(|(role, value)| Ok((role, f(role, value)?)));
        Ok(Conditioning { by_role: mapped.collect::<Result<_, E>>()?, state: PhantomData })
    }
}

impl Conditioning<Raw> {
    /// The same on `device`, without the roles that the embedding reads on the host: those stay where they are.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.clone().try_map(|role, tensor| match role.residence() {
            Residence::Host => Ok(tensor),
            Residence::Device => Ok(tensor.to_device(device)?),
        })
    }

    /// The conditioning of single samples, without a batch axis, as that of a batch.
    ///
    /// # Errors
    /// When one sample has a role that another lacks, and where the shapes of a role differ by more than its padding.
    pub fn stacked(samples: &[&Self]) -> Result<Self> {
        let Some(first) = samples.first() else { return Ok(Self::new()) };
        if let Some(other) = samples.iter().find(|other| !other.by_role.keys().eq(first.by_role.keys())) {
            let names =
                |one: &Self| one.by_role.keys().map(|role| role.name()).collect::<Vec<_>>().join(", ");
            return Err(Error::Mismatch(format!(
                "samples of one batch are conditioned on different things: {} and {}",
                names(first),
                names(other)
            )));
        }
        (*first).clone().try_map(|role, _| {
            let each = samples.iter().map(|sample| sample.require(role)).collect::<Result<Vec<_>>>()?;
            match role.rows() {
                Rows::Equal => Ok(Tensor::stack(&each, 0)?),
                Rows::Padded => padded(&each),
            }
        })
    }
}

/// Tensors [rows, ..] as one [b, rows, ..], with zero rows behind the shorter ones.
fn padded(each: &[&Tensor]) -> Result<Tensor> {
    let rows = each.iter().map(|x| x.dim(0)).collect::<kernels::Result<Vec<_>>>()?;
    let longest = rows.iter().copied().max().unwrap_or(0);
    let padded = each.iter().map(|x| x.pad_with_zeros(0, 0, longest - x.dim(0)?));
    Ok(Tensor::stack(&padded.collect::<kernels::Result<Vec<_>>>()?, 0)?)
}
