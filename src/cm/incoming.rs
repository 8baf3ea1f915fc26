//! The passive side: a listener and its connection requests.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rdma_sys_ext::rdma_cm::event as kind;

use super::error::{Error, Result};
use super::raw::{CmLink, Event, Id};
use super::statement::Statement;
use super::{ANSWER, REJECT_DATA, REQUEST};
use super::{Connecting, Wait, block, check_data, check_device, no_manager, own_statement, refused, start};
use crate::transfer::Connection;
use crate::verbs::{Depth, absence};

/// Maximum number of connection requests that wait for [`Listener::accept_request`].
const BACKLOG: i32 = 128;

/// Listens for connection requests on an IP address.
pub struct Listener {
    id: Id,
    address: SocketAddr,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A connection request of a peer. [`accept`](Self::accept) it; dropping it rejects it.
pub struct Incoming {
    /// `None` after it was accepted or rejected.
    id: Option<Id>,
    address: SocketAddr,
    request: Event,
    /// What the peer states, if it uses this library.
    peer: Option<Statement>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("peer", &self.address).finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens on an address of an RDMA device, or on all devices if the IP address is unspecified. Port 0 chooses
    /// a free port.
    ///
    /// # Errors
    /// - [`Error::NoManager`]: librdmacm, the kernel module rdma_ucm, access to its device, or any RDMA device is
    ///   missing; `EMFILE` if no descriptor is free.
    /// - [`Error::Listen`]: `EADDRINUSE` if another program listens there, `EADDRNOTAVAIL` or `ENODEV` if no RDMA
    ///   device has the address.
    #[doc(alias("rdma_bind_addr", "rdma_listen"))]
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let id = Id::new().map_err(no_manager)?;
        id.bind(address)
            .and_then(|()| id.listen(BACKLOG))
            .map_err(|source| Error::Listen { address, source })?;
        let address = id.local_address().unwrap_or(address);
        Ok(Self { id, address })
    }

    /// The listener's address, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next connection request.
    ///
    /// # Errors
    /// - [`Error::Timeout`]: no request within `timeout`.
    /// - [`Error::Failed`]: the device was removed, or librdmacm failed; `EMFILE` if no descriptor is free. The
    ///   request then waits.
    pub fn accept_request(&self, timeout: Duration) -> Result<Incoming> {
        block(self.accept_request_by(Wait::Block, timeout))
    }

    /// The next connection request if there is one. The listener's descriptor ([`AsFd`]) is readable while there may be.
    ///
    /// # Errors
    /// As [`accept_request`](Self::accept_request), without the timeout.
    pub fn try_accept_request(&self) -> Result<Option<Incoming>> {
        match self.accept_request(Duration::ZERO) {
            Err(Error::Timeout { .. }) => Ok(None),
            accepted => accepted.map(Some),
        }
    }

    /// Like [`accept_request`](Self::accept_request), without blocking the thread of a tokio runtime.
    ///
    /// # Errors
    /// As [`accept_request`](Self::accept_request).
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn accept_request_async(&self, timeout: Duration) -> Result<Incoming> {
        self.accept_request_by(Wait::Tokio, timeout).await
    }

    async fn accept_request_by(&self, how: Wait, timeout: Duration) -> Result<Incoming> {
        let until = (Instant::now(), timeout);
        let step = "receive a request";
        let failed = |source| Error::Failed { step, address: self.address, source };
        loop {
            // librdmacm drops a request if it has no descriptor for it.
            absence::descriptors().map_err(failed)?;
            let mut event = how.event(&self.id, self.address, step, until).await?;
            match event.request.take() {
                Some(raw) => {
                    let id = Id::of_request(raw).map_err(failed)?;
                    let address = id.peer_address().unwrap_or(self.address);
                    let peer = Statement::take(&mut event.private_data, REQUEST);
                    return Ok(Incoming { id: Some(id), address, request: event, peer });
                }
                None if event.kind == kind::DEVICE_REMOVAL => {
                    return Err(refused(event, self.address, step));
                }
                None => {}
            }
        }
    }
}

impl AsFd for Listener {
    /// Readable when [`try_accept_request`](Self::try_accept_request) may find a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.id.fd()
    }
}

impl Incoming {
    fn id(&self) -> &Id {
        self.id.as_ref().expect("only accept and reject take the id, and they consume the request")
    }

    /// The device that received the request. Create the [`Connection`] on it.
    pub fn device_name(&self) -> String {
        self.id().device_name()
    }

    /// The port of that device.
    pub fn port(&self) -> u8 {
        self.id().port()
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.address
    }

    /// The private data of the request, padded with zeros.
    pub fn private_data(&self) -> &[u8] {
        &self.request.private_data
    }

    /// Accepts the request with up to 192 bytes of private data, 188 with notifications, and connects `connection`. Receives may be posted
    /// before. After an error the request is rejected.
    ///
    /// # Errors
    /// - [`Error::OtherDevice`]: the connection is on another device or port than the request.
    /// - [`Error::PrivateDataTooLong`]: more bytes.
    /// - [`Error::MtuMismatch`]: the peer uses another library, and a larger MTU than this side's port carries.
    /// - [`Error::Verbs`]: the queue pair cannot be brought to INIT, RTR or RTS: `EINVAL` if it is connected already.
    /// - [`Error::Timeout`]: the peer did not confirm within `timeout`.
    /// - [`Error::Rejected`], [`Error::Unreachable`], [`Error::Failed`]: the peer gave up, or the kernel failed.
    #[doc(alias = "rdma_accept")]
    pub fn accept(self, connection: &mut Connection, data: &[u8], timeout: Duration) -> Result<()> {
        block(self.accept_by(Wait::Block, connection, data, timeout))
    }

    /// Like [`accept`](Self::accept), without blocking the thread of a tokio runtime. If the future is dropped before it
    /// is done, the connection cannot be used any more.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn accept_async(
        self,
        connection: &mut Connection,
        data: &[u8],
        timeout: Duration,
    ) -> Result<()> {
        self.accept_by(Wait::Tokio, connection, data, timeout).await
    }

    async fn accept_by(
        mut self,
        how: Wait,
        connection: &mut Connection,
        data: &[u8],
        timeout: Duration,
    ) -> Result<()> {
        let until = (Instant::now(), timeout);
        let address = self.address;
        check_device(self.id(), address, connection)?;
        let own = own_statement(connection)?;
        check_data(data, ANSWER - own.size())?;
        start(self.id(), address, connection, (own, self.peer))?;
        let connecting = Connecting(connection);
        let Some(id) = self.id.take() else { unreachable!("only accept and reject take the id") };
        let ours = connection.depth();
        // The request states what this side is to serve, and what the peer serves.
        let depth = Depth {
            responder: self.request.responder_resources.min(ours.responder),
            initiator: self.request.initiator_depth.min(ours.initiator),
        };
        let step = "accept the connection";
        let failed = |source| Error::Failed { step, address, source };
        let data = own.append(data, ANSWER);
        id.accept(connection.queue_pair().number(), depth, &data).map_err(failed)?;
        let step = "establish the connection";
        how.expect(kind::ESTABLISHED, &id, address, step, until).await?;
        connecting.established();
        connection.set_link(Box::new(CmLink::new(id)));
        Ok(())
    }

    /// Rejects the request with up to 148 bytes of private data.
    ///
    /// # Errors
    /// - [`Error::PrivateDataTooLong`]: more than 148 bytes; the request is rejected without data.
    /// - [`Error::Failed`]: the kernel failed to reject.
    #[doc(alias = "rdma_reject")]
    pub fn reject(mut self, data: &[u8]) -> Result<()> {
        check_data(data, REJECT_DATA)?;
        let address = self.address;
        let Some(id) = self.id.take() else { unreachable!("only accept and reject take the id") };
        id.reject(data).map_err(|source| Error::Failed { step: "reject the connection", address, source })
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(id) = self.id.as_ref().filter(|id| id.is_own())
            && let Err(error) = id.reject(&[])
        {
            tracing::debug!(%error, "cannot reject a connection");
        }
    }
}
