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
use super::request::Payload;
use super::{Opcode, QueuePair, RecvBatch, SendBatch, Sge, WorkRequest, check};

/// Scatter/gather elements of a work request that need no allocation.
const FEW: usize = 32;

impl QueuePair {
    /// Posts a work request.
    ///
    /// # Errors
    /// - [`Error::RequestTooLarge`]: more elements than [`max_sge`](super::QueuePairOptions::max_sge), or in a READ more
    ///   than [`Limits::max_sge_read`](super::Limits::max_sge_read); more inline bytes than
    ///   [`max_inline`](super::QueuePairOptions::max_inline).
    /// - [`Error::ContextMismatch`]: an element of another protection domain than the queue pair's.
    /// - [`Error::InvalidAtomic`]: an atomic on other than 8 bytes at a multiple of 8.
    /// - [`Error::Unavailable`]: a READ or an atomic, and one side has [`rd_atomic`](super::QueuePairOptions::rd_atomic)
    ///   0; an inline READ or atomic; immediate data or an atomic, and the device is on iWARP without them.
    /// - [`Error::Post`]: `ENOMEM` if the queue is full, `EINVAL` if the queue pair is not connected.
    #[doc(alias = "ibv_post_send")]
    pub fn post(&self, request: WorkRequest<'_>) -> Result<()> {
        let opcode = request.operation.opcode();
        let mut wr = ffi::ibv_send_wr::default();
        self.fill(&request, &mut wr)?;
        with_list(&request.payload, |list, count| {
            (wr.sg_list, wr.num_sge) = (list, count);
            // SAFETY: the queue pair is live. The call reads the request and its list and keeps neither.
            // The regions behind the elements limit which memory the device accesses.
            unsafe { inline::post_send(self.as_raw().as_ptr(), &mut wr, &mut null_mut()) }
        })
        .map_err(|source| self.post_error(opcode, source))
    }

    /// Posts a chain of work requests in one call: the device learns of all of them at once (one doorbell). They are
    /// checked before any is posted.
    ///
    /// # Errors
    /// [`Error::Chain`] names the request that was refused, and says how many were posted. Its source is the error
    /// that [`post`](Self::post) has. If a check failed, nothing was posted. If the provider refused the request
    /// (`ENOMEM`: the queue is full), those before it are posted.
    #[doc(alias = "ibv_post_send")]
    pub fn post_chain(&self, requests: &[WorkRequest<'_>]) -> Result<()> {
        let most = requests.iter().map(|request| request.payload.count()).max().unwrap_or(0);
        // Checked first, since it limits what is allocated.
        self.check_chain(requests, |request| {
            self.check_payload(request.operation.opcode(), &request.payload)
        })?;
        let mut batch = SendBatch::new(requests.len(), most);
        self.check_chain(requests, |request| {
            let (wr, list) = batch.next();
            self.fill(request, wr)?;
            wr.num_sge = request.payload.write(list);
            batch.add();
            Ok(())
        })?;
        let opcode = |at: usize| requests.get(at).map_or(Opcode::Send, |request| request.operation.opcode());
        batch
            .post(self)
            .map_err(|(posted, source)| chain(posted, posted, self.post_error(opcode(posted), source)))
    }

    /// Posts a receive: the bytes of the peer's next SEND go into these elements. A receive without elements
    /// takes a SEND of 0 bytes, or the immediate data of a WRITE.
    ///
    /// # Errors
    /// - [`Error::RequestTooLarge`]: more elements than [`max_sge`](super::QueuePairOptions::max_sge).
    /// - [`Error::ContextMismatch`]: an element of another protection domain than the queue pair's.
    /// - [`Error::Post`]: `ENOMEM` if the queue is full.
    #[doc(alias = "ibv_post_recv")]
    pub fn post_recv(&self, wr_id: u64, elements: &[Sge<'_>]) -> Result<()> {
        self.check_elements(Opcode::Recv, elements)?;
        let mut wr = ffi::ibv_recv_wr { wr_id, ..Default::default() };
        with_list(&Payload::Elements(elements), |list, count| {
            (wr.sg_list, wr.num_sge) = (list, count);
            // SAFETY: as in `post`.
            unsafe { inline::post_recv(self.as_raw().as_ptr(), &mut wr, &mut null_mut()) }
        })
        .map_err(|source| self.post_error(Opcode::Recv, source))
    }

    /// Posts a chain of receives in one call, each with its `wr_id` and its elements; see
    /// [`post_chain`](Self::post_chain).
    ///
    /// # Errors
    /// [`Error::Chain`], with the source that [`post_recv`](Self::post_recv) has.
    #[doc(alias = "ibv_post_recv")]
    pub fn post_recv_chain(&self, receives: &[(u64, &[Sge<'_>])]) -> Result<()> {
        self.check_chain(receives, |(_, elements)| self.check_elements(Opcode::Recv, elements))?;
        let most = receives.iter().map(|(_, elements)| elements.len()).max().unwrap_or(0);
        let mut batch = RecvBatch::new(receives.len(), most);
        for (wr_id, elements) in receives {
            let (wr, list) = batch.next();
            (wr.wr_id, wr.num_sge) = (*wr_id, Payload::Elements(elements).write(list));
            batch.add();
        }
        batch
            .post(self)
            .map_err(|(posted, source)| chain(posted, posted, self.post_error(Opcode::Recv, source)))
    }

    /// Checks each request of a chain, before any is posted.
    fn check_chain<R>(&self, requests: &[R], mut check: impl FnMut(&R) -> Result<()>) -> Result<()> {
        requests.iter().enumerate().try_for_each(|(at, request)| check(request).map_err(|e| chain(at, 0, e)))
    }

    /// Checks a request and fills it in, without its elements.
    fn fill(&self, request: &WorkRequest<'_>, wr: &mut ffi::ibv_send_wr) -> Result<()> {
        let opcode = request.operation.opcode();
        request.operation.fill(wr, request.payload.bytes())?;
        self.check_depth(opcode)?;
        self.check_payload(opcode, &request.payload)?;
        (wr.wr_id, wr.send_flags) = (request.wr_id, request.flags);
        Ok(())
    }

    fn check_payload(&self, opcode: Opcode, payload: &Payload<'_>) -> Result<()> {
        let bytes = match payload {
            Payload::Elements(elements) => return self.check_elements(opcode, elements),
            Payload::Inline(_) => payload.bytes(),
        };
        if opcode == Opcode::Read || opcode.is_atomic() {
            return Err(Error::Unavailable {
                device: self.context.device_name().into(),
                operation: "inline READs and atomics",
                needs: "an operation that sends bytes, a SEND or a WRITE",
                source: None,
            });
        }
        let limit = self.max_inline;
        if bytes > limit.into() {
            let (what, remedy) = (
                "inline bytes",
                "send them from a region, or create the queue pair with a larger max_inline",
            );
            return Err(Error::RequestTooLarge { what, count: bytes, limit: limit.into(), remedy });
        }
        Ok(())
    }

    /// Checks number and domain of the elements.
    fn check_elements(&self, opcode: Opcode, elements: &[Sge<'_>]) -> Result<()> {
        let limit = self.max_sge(opcode);
        if elements.len() > limit as usize {
            let (what, remedy) = (
                "scatter/gather elements",
                "split the request, or create the queue pair with a larger max_sge",
            );
            let count = elements.len() as u64;
            return Err(Error::RequestTooLarge { what, count, limit: limit.into(), remedy });
        }
        if self.domain.is_some_and(|domain| elements.iter().any(|element| !element.fits(domain))) {
            return Err(Error::ContextMismatch {
                object: "scatter/gather element",
                user: "queue pair",
                parent: "protection domain",
                device: self.context.device_name().into(),
            });
        }
        Ok(())
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

/// Passes the elements to `post` as a C list.
fn with_list(payload: &Payload<'_>, post: impl FnOnce(*mut ffi::ibv_sge, c_int) -> c_int) -> io::Result<()> {
    let (mut few, mut many) = ([ffi::ibv_sge::default(); FEW], Vec::new());
    let list = match few.get_mut(..payload.count()) {
        Some(list) => list,
        None => {
            many.resize(payload.count(), ffi::ibv_sge::default());
            &mut many[..]
        }
    };
    let count = payload.write(list);
    check(post(list.as_mut_ptr(), count))
}

fn chain(refused: usize, posted: usize, source: Error) -> Error {
    Error::Chain { refused, posted, source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dmabuf::BufferId;
    use crate::kind::ErrorKind;
    use crate::mr::Access;
    use crate::mr::tests::{domain, fake};
    use crate::verbs::{Operation, RemoteAddr, qp};

    /// What libibverbs would get: addresses and keys.
    fn listed(pair: &QueuePair, elements: &[Sge<'_>]) -> Result<Vec<(u64, u32)>> {
        let mut listed = Vec::new();
        pair.check_elements(Opcode::Write, elements)?;
        with_list(&Payload::Elements(elements), |list, count| {
            // SAFETY: the list has `count` elements.
            let list = unsafe { std::slice::from_raw_parts(list, count as usize) };
            listed.extend(list.iter().map(|raw| (raw.addr, raw.lkey)));
            0
        })
        .unwrap();
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
        assert!(matches!(refused, Error::RequestTooLarge { count: 41, limit: 40, .. }), "{refused:?}");
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
        let refused = limited.post(WorkRequest::new(1, Operation::Read { remote }, &two)).unwrap_err();
        assert!(matches!(refused, Error::RequestTooLarge { count: 2, limit: 1, .. }), "{refused:?}");
        assert_eq!((limited.max_sge(Opcode::Read), limited.max_sge(Opcode::Write)), (1, 40));

        let none = qp::tests::fake(&domain);
        none.set_initiator_depth(0);
        for operation in [Operation::Read { remote }, Operation::FetchAdd { remote, add: 1 }] {
            let refused = none.post(WorkRequest::new(1, operation, &two[..1])).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            assert!(refused.to_string().contains("rd_atomic above 0 on both sides"), "{refused}");
        }
        none.check_depth(Opcode::Write).unwrap();
        none.check_depth(Opcode::Send).unwrap();
    }

    #[test]
    fn inline_requests_and_chains_are_checked_before_anything_is_posted() {
        let domain = domain();
        let region = fake::region_of(&domain, BufferId::UNKNOWN, 0..4096, Access::empty());
        let pair = qp::tests::fake(&domain);
        let remote = RemoteAddr { addr: 0, rkey: region.rkey() };
        let short = [region.sge(..64).unwrap()];
        let too_long = WorkRequest::inline(2, Operation::Write { remote }, &[7; 65]);
        let refused = pair.post(too_long).unwrap_err();
        assert!(
            matches!(refused, Error::RequestTooLarge { what: "inline bytes", count: 65, limit: 64, .. }),
            "{refused:?}"
        );
        let read = WorkRequest::inline(2, Operation::Read { remote }, &[7; 8]);
        assert!(matches!(pair.post(read), Err(Error::Unavailable { .. })));

        let fine = WorkRequest::new(1, Operation::Write { remote }, &short);
        let refused = pair.post_chain(&[fine, fine, too_long, fine]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Misuse);
        assert_eq!(refused.to_string(), "request 2 of the chain was refused, and nothing was posted");
        assert!(matches!(refused, Error::Chain { refused: 2, posted: 0, .. }), "{refused:?}");
        let many = vec![short[0]; 41];
        let refused = pair.post_recv_chain(&[(1, &short[..]), (2, &many)]).unwrap_err();
        assert!(matches!(refused, Error::Chain { refused: 1, posted: 0, .. }), "{refused:?}");
        pair.post_chain(&[]).unwrap();
        pair.post_recv_chain(&[]).unwrap();
    }
}
