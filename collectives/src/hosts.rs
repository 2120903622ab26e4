//! Collectives of bytes over all hosts: what goes between hosts goes between counterparts (ranks of one
//! number), then it is shared within each host.

use std::time::Duration;

use crate::error::{CollectiveError, Result};
use crate::group::{Group, Op};

impl Group {
    /// Number of ranks on all hosts.
    pub(crate) fn ranks_of_all_hosts(&self) -> usize {
        self.world_size * self.mesh.as_ref().map_or(1, |mesh| mesh.hosts())
    }

    /// Gives every rank the bytes of `root`, numbered among all; those of the others are dropped.
    pub(crate) fn broadcast(
        &mut self,
        root: usize,
        bytes: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>> {
        let world_size = self.ranks_of_all_hosts();
        if root >= world_size {
            return Err(CollectiveError::NoSuchRoot { root, world_size });
        }
        let (host, place) = (root / self.world_size, root % self.world_size);
        let bytes = match &self.mesh {
            None => bytes,
            Some(mesh) => {
                let own = if mesh.host() == host { bytes } else { Vec::new() };
                // Every rank calls it, so that the count of collectives stays one; the root's
                // counterparts alone have something to say.
                let own = if self.rank == place { own } else { Vec::new() };
                self.exchange(&own, deadline)?.swap_remove(host)
            }
        };
        self.broadcast_here(place, bytes, deadline)
    }

    /// The bytes of all ranks of all hosts, by rank. Lengths may differ.
    pub(crate) fn all_gather(&mut self, own: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        if self.mesh.is_none() {
            return self.all_gather_here(own, deadline);
        }
        let column = self.exchange(own, deadline)?;
        let columns = self.all_gather_here(&pack(&column), deadline)?;
        let columns: Option<Vec<Vec<Vec<u8>>>> =
            columns.iter().map(|bytes| unpack(bytes)).collect();
        // Packed by this very build, within this host.
        let mut columns = columns.unwrap_or_default();
        let mut gathered = Vec::new();
        for host in 0..column.len() {
            for column in &mut columns {
                gathered.push(column.get_mut(host).map(std::mem::take).unwrap_or_default());
            }
        }
        Ok(gathered)
    }

    /// The bytes of this rank's counterparts, by host, its own among them.
    fn exchange(&mut self, own: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        self.call(Op::Counterparts, 0, deadline, |group, call| {
            group.meet(call)?;
            let gathered = group.across_hosts(call, |mesh, wait| mesh.gather(own, wait))?;
            Ok(gathered.unwrap_or_else(|| vec![own.to_vec()]))
        })
    }
}

/// Each with its length before it.
fn pack(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut packed = Vec::new();
    for part in parts {
        packed.extend_from_slice(&(part.len() as u64).to_le_bytes());
        packed.extend_from_slice(part);
    }
    packed
}

fn unpack(mut packed: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    while let Some((length, rest)) = packed.split_first_chunk::<8>() {
        let (part, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        parts.push(part.to_vec());
        packed = rest;
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_parts_come_out_as_they_went_in() {
        let parts = vec![b"a".to_vec(), Vec::new(), vec![7; 300]];
        let packed = pack(&parts);
        assert_eq!(unpack(&packed), Some(parts));
        assert_eq!(unpack(&packed[..packed.len() - 1]), None);
    }
}
