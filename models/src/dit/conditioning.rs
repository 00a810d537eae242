//! The conditioning of the network: one collection of tensors by role.
//!
//! Code that places, sends, parks or stacks conditioning does so through [`Conditioning::try_map`] and the properties of the
//! [`Role`], so a new role only needs an encoder that makes it and a model that reads it.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use kernels::{Device, Tensor};

use super::role::{Residence, Role, Rows};
use crate::{Error, Result};

/// Marks conditioning from the encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raw;

/// Marks conditioning after the model's embeddings, as layers read it. It crosses the boundaries between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embedded;

/// Values of type `T` by role, [`Raw`] or [`Embedded`].
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
    /// An empty collection.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with `value` as `role`; replaces an earlier value.
    pub fn with(mut self, role: Role, value: T) -> Self {
        self.insert(role, value);
        self
    }

    /// [`Self::with`] if there is a value.
    pub fn with_optional(self, role: Role, value: Option<T>) -> Self {
        match value {
            Some(value) => self.with(role, value),
            None => self,
        }
    }

    /// All roles of both; `other` takes precedence.
    pub fn merged(mut self, other: Self) -> Self {
        self.by_role.extend(other.by_role);
        self
    }

    /// Inserts `value` as `role`; replaces an earlier value.
    pub fn insert(&mut self, role: Role, value: T) {
        self.by_role.insert(role, value);
    }

    /// Removes and returns the value of `role`: for embeddings that read a role of their own and pass the rest on.
    pub fn take(&mut self, role: Role) -> Option<T> {
        self.by_role.remove(&role)
    }

    /// The value of `role`, if any.
    pub fn get(&self, role: Role) -> Option<&T> {
        self.by_role.get(&role)
    }

    /// The value of `role`, which the model reads.
    ///
    /// # Errors
    /// [`Error::RoleMissing`] if there is none.
    pub fn require(&self, role: Role) -> Result<&T> {
        self.get(role).ok_or(Error::RoleMissing { role })
    }

    /// Checks that every role here is one of `known`.
    ///
    /// # Errors
    /// [`Error::RoleUnread`] with the first that is not: conditioning that the model does not read is a caller's mistake.
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
    /// The same on `device`, except the roles that the embedding reads on the host, which stay there.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.clone().try_map(|role, tensor| match role.residence() {
            Residence::Host => Ok(tensor),
            Residence::Device => Ok(tensor.to_device(device)?),
        })
    }

    /// Stacks the conditioning of single samples, which has no batch axis, into that of a batch.
    ///
    /// # Errors
    /// If one sample has a role that another lacks, or the shapes of a role differ by more than its padding.
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

/// Stacks tensors [rows, ..] into one [b, rows, ..], shorter ones padded with zero rows.
fn padded(each: &[&Tensor]) -> Result<Tensor> {
    let rows = each.iter().map(|x| x.dim(0)).collect::<kernels::Result<Vec<_>>>()?;
    let longest = rows.iter().copied().max().unwrap_or(0);
    let padded = each.iter().map(|x| x.pad_with_zeros(0, 0, longest - x.dim(0)?));
    Ok(Tensor::stack(&padded.collect::<kernels::Result<Vec<_>>>()?, 0)?)
}
