//! Posts work requests to a queue pair.
//!
//! `unsafe` is here to pass C structs to libibverbs.

use std::ffi::c_int;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::Ordering;

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::error::{Error, Result};
use super::{Opcode, Operation, QueuePair, Sge, check};

/// Scatter/gather elements of a work request that need no allocation.
const FEW: usize = 32;

impl QueuePair {
    /// Posts a work request. Its completion carries `wr_id`. A request that is not `signaled` has a completion
    /// only if it fails; the next signaled one shows that it succeeded.
    ///
    /// # Errors
    /// - [`Error::TooManySge`]: more elements than [`max_sge`](super::QueuePairOptions::max_sge), or in a READ more than
    ///   [`Limits::max_sge_read`](super::Limits::max_sge_read).
    /// - [`Error::ContextMismatch`]: an element of another protection domain than the queue pair's.
    /// - [`Error::InvalidAtomic`]: an atomic on other than 8 bytes at a multiple of 8.
    /// - [`Error::Unavailable`]: a READ or an atomic, and one side has [`rd_atomic`](super::QueuePairOptions::rd_atomic)
    ///   0; immediate data or an atomic, and the device is on iWARP without them.
    /// - [`Error::Post`]: `ENOMEM` if the queue is full, `EINVAL` if the queue pair is not connected.
    #[doc(alias = "ibv_post_send")]
    pub fn post(&self, wr_id: u64, operation: Operation, elements: &[Sge<'_>], signaled: bool) -> Result<()> {
        let opcode = operation.opcode();
        let mut wr = operation.request(elements)?;
        self.check_depth(opcode)?;
        self.with_list(opcode, elements, |list, count| {
            (wr.wr_id, wr.sg_list, wr.num_sge) = (wr_id, list, count);
            if signaled {
                wr.send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
            }
            // SAFETY: the queue pair is live. The call reads the request and its list and keeps neither.
            // The regions behind the elements limit which memory the device accesses.
            unsafe { inline::post_send(self.as_raw().as_ptr(), &mut wr, &mut null_mut()) }
        })
    }

    /// Posts a receive: the bytes of the peer's next SEND go into these elements. A receive without elements
    /// takes a SEND of 0 bytes, or the immediate data of a WRITE.
    ///
    /// # Errors
    /// - [`Error::TooManySge`]: more elements than [`max_sge`](super::QueuePairOptions::max_sge).
    /// - [`Error::ContextMismatch`]: an element of another protection domain than the queue pair's.
    /// - [`Error::Post`]: `ENOMEM` if the queue is full.
    #[doc(alias = "ibv_post_recv")]
    pub fn post_recv(&self, wr_id: u64, elements: &[Sge<'_>]) -> Result<()> {
        let mut wr = ffi::ibv_recv_wr { wr_id, ..Default::default() };
        self.with_list(Opcode::Recv, elements, |list, count| {
            (wr.sg_list, wr.num_sge) = (list, count);
            // SAFETY: as in `post`.
            unsafe { inline::post_recv(self.as_raw().as_ptr(), &mut wr, &mut null_mut()) }
        })
    }

    /// Checks the elements of a work request and passes them to `post` as a C list.
    fn with_list(
        &self,
        opcode: Opcode,
        elements: &[Sge<'_>],
        post: impl FnOnce(*mut ffi::ibv_sge, c_int) -> c_int,
    ) -> Result<()> {
        let limit = self.max_sge(opcode);
        if elements.len() > limit as usize {
            return Err(Error::TooManySge { count: elements.len(), limit });
        }
        if self.domain.is_some_and(|domain| elements.iter().any(|element| !element.fits(domain))) {
            return Err(Error::ContextMismatch {
                object: "scatter/gather element",
                user: "queue pair",
                parent: "protection domain",
                device: self.context.device_name().into(),
            });
        }
        let (mut few, mut many) = ([ffi::ibv_sge::default(); FEW], Vec::new());
        let list = match few.get_mut(..elements.len()) {
            Some(list) => list,
            None => {
                many.resize(elements.len(), ffi::ibv_sge::default());
                &mut many[..]
            }
        };
        for (raw, element) in list.iter_mut().zip(elements) {
            *raw = element.raw();
        }
        check(post(list.as_mut_ptr(), elements.len() as c_int))
            .map_err(|source| self.post_error(opcode, source))
    }

    /// The error of a work request that the provider refused. iWARP has immediate data and atomics only since RFC
    /// 7306, and few devices have them.
    pub(crate) fn post_error(&self, opcode: Opcode, source: io::Error) -> Error {
        let newer = !matches!(opcode, Opcode::Write | Opcode::Read | Opcode::Send | Opcode::Recv);
        let refused = matches!(source.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP));
        if newer && refused && self.context.is_iwarp() {
            return Error::Unavailable {
                device: self.context.device_name().into(),
                operation: "immediate data or atomics",
                needs: "InfiniBand, RoCE, or an iWARP device with RFC 7306",
                source: Some(source.into()),
            };
        }
        Error::Post { opcode, source }
    }

    /// Refuses a READ or an atomic on a connection that has none in flight: the device would never send it.
    pub(crate) fn check_depth(&self, opcode: Opcode) -> Result<()> {
        let in_flight = matches!(opcode, Opcode::Read | Opcode::FetchAdd | Opcode::CompareSwap);
        if in_flight && self.initiator_depth.load(Ordering::Relaxed) == 0 {
            return Err(Error::Unavailable {
                device: self.context.device_name().into(),
                operation: "room for READs and atomics in flight",
                needs: "QueuePairOptions::rd_atomic above 0 on both sides, and devices that initiate and serve READs (Context::limits)",
                source: None,
            });
        }
        Ok(())
    }

    /// Most scatter/gather elements in a work request.
    pub(crate) fn max_sge(&self, opcode: Opcode) -> u32 {
        if opcode == Opcode::Read { self.max_sge_read } else { self.max_sge }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dmabuf::BufferId;
    use crate::kind::ErrorKind;
    use crate::mr::Access;
    use crate::mr::tests::{domain, fake};
    use crate::verbs::{RemoteAddr, qp};

    /// What libibverbs would get: addresses and keys.
    fn listed(pair: &QueuePair, elements: &[Sge<'_>]) -> Result<Vec<(u64, u32)>> {
        let mut listed = Vec::new();
        pair.with_list(Opcode::Write, elements, |list, count| {
            // SAFETY: the list has `count` elements.
            let list = unsafe { std::slice::from_raw_parts(list, count as usize) };
            listed.extend(list.iter().map(|raw| (raw.addr, raw.lkey)));
            0
        })?;
        Ok(listed)
    }

    #[test]
    fn an_element_of_another_domain_is_refused() {
        let (ours, other) = (domain(), domain());
        let region = |domain| fake::region_of(domain, BufferId::UNKNOWN, 0..4096, Access::empty());
        let (near, far) = (region(&ours), region(&other));
        let pair = qp::tests::fake(&ours);
        assert_eq!(listed(&pair, &[near.sge(8..16).unwrap()]).unwrap(), [(8, near.lkey().0)]);

        let slices = [near.slice(..8).unwrap(), far.slice(..8).unwrap()];
        let both = crate::RegionSlice::concat(&slices).unwrap();
        for elements in [vec![far.sge(..).unwrap()], vec![slices[1].sge().unwrap()], both.sges()] {
            let refused = listed(&pair, &elements).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Misuse);
            assert_eq!(
                refused.to_string(),
                "stub0: the scatter/gather element belongs to another protection domain than the queue pair: \
                 both need one protection domain"
            );
        }
        // SAFETY: it is not posted.
        let foreign = unsafe { Sge::from_raw(ffi::ibv_sge { addr: 1, length: 2, lkey: 3 }) };
        assert_eq!(listed(&pair, &[foreign]).unwrap(), [(1, 3)]);
    }

    #[test]
    fn a_list_of_any_length_is_passed_whole() {
        let domain = domain();
        let region = fake::region_of(&domain, BufferId::UNKNOWN, 0..4096, Access::empty());
        let pair = qp::tests::fake(&domain);
        for count in [0, 1, FEW, FEW + 1, 40] {
            let elements: Vec<_> = (0..count as u64).map(|at| region.sge(at..=at).unwrap()).collect();
            let expected: Vec<_> = (0..count as u64).map(|at| (at, region.lkey().0)).collect();
            assert_eq!(listed(&pair, &elements).unwrap(), expected);
        }
        let refused = listed(&pair, &vec![region.sge(..).unwrap(); 41]).unwrap_err();
        assert!(matches!(refused, Error::TooManySge { count: 41, limit: 40 }), "{refused:?}");
    }

    #[test]
    fn reads_keep_to_their_own_limits() {
        let domain = domain();
        let region = fake::region_of(&domain, BufferId::UNKNOWN, 0..4096, Access::empty());
        let two = [region.sge(..8).unwrap(); 2];
        let remote = RemoteAddr { addr: 0, rkey: region.rkey() };
        let limited = {
            let mut pair = qp::tests::fake(&domain);
            pair.max_sge_read = 1;
            pair
        };
        let refused = limited.post(1, Operation::Read { remote }, &two, true).unwrap_err();
        assert!(matches!(refused, Error::TooManySge { count: 2, limit: 1 }), "{refused:?}");
        assert_eq!((limited.max_sge(Opcode::Read), limited.max_sge(Opcode::Write)), (1, 40));

        let none = qp::tests::fake(&domain);
        none.set_initiator_depth(0);
        for operation in [Operation::Read { remote }, Operation::FetchAdd { remote, add: 1 }] {
            let refused = none.post(1, operation, &two[..1], true).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            assert!(refused.to_string().contains("rd_atomic above 0 on both sides"), "{refused}");
        }
        none.check_depth(Opcode::Write).unwrap();
        none.check_depth(Opcode::Send).unwrap();
    }
}
