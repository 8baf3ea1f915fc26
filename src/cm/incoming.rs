//! The side that waits for connections.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rdma_sys_ext::rdma_cm::event as kind;

use super::raw::{Event, Id, Link};
use super::{ANSWER_DATA, REJECT_DATA, check_data, check_device, refused, start, wait};
use crate::Result;
use crate::error::ConnectError;
use crate::transfer::Connection;

/// Requests that wait to be taken.
const BACKLOG: i32 = 128;

/// An address at which connections are waited for.
pub struct Listener {
    id: Id,
    address: SocketAddr,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A request for a connection, to be accepted or rejected; dropping it rejects it.
pub struct Incoming {
    // None once it was accepted or rejected.
    id: Option<Id>,
    address: SocketAddr,
    request: Event,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("peer", &self.address).finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens at an address of an RDMA device, or at an unspecified one, which is all of them. Port 0
    /// takes any that is free.
    ///
    /// # Errors
    /// [`ConnectError::NoManager`]; [`ConnectError::Listen`]: `EADDRINUSE`, `EADDRNOTAVAIL`, `ENODEV`.
    #[doc(alias("rdma_bind_addr", "rdma_listen"))]
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let id = Id::new().map_err(|source| ConnectError::NoManager { source })?;
        id.bind(address)
            .and_then(|()| id.listen(BACKLOG))
            .map_err(|source| ConnectError::Listen { address, source })?;
        let address = id.local_address().unwrap_or(address);
        Ok(Self { id, address })
    }

    /// The address, with the port that was taken.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next request.
    ///
    /// # Errors
    /// [`ConnectError::ConnectTimeout`]: none within `limit`. [`ConnectError::Failed`]: the device went.
    pub fn next(&self, limit: Duration) -> Result<Incoming> {
        let until = (Instant::now(), limit);
        let step = "be asked for one";
        loop {
            let mut event = wait(&self.id, self.address, step, until)?;
            match event.request.take() {
                Some(raw) => {
                    let failed =
                        |source| ConnectError::Failed { step: "take", address: self.address, source };
                    let id = Id::of_request(raw).map_err(failed)?;
                    let address = id.peer_address().unwrap_or(self.address);
                    return Ok(Incoming { id: Some(id), address, request: event });
                }
                None if event.kind == kind::DEVICE_REMOVAL => {
                    return Err(refused(event, self.address, "listen for"));
                }
                None => {}
            }
        }
    }
}

impl Incoming {
    fn id(&self) -> &Id {
        self.id.as_ref().expect("only accept and reject take it, and they consume the request")
    }

    /// Name of the device that the request came in through.
    pub fn device_name(&self) -> String {
        self.id().device_name()
    }

    /// Port of that device.
    pub fn port(&self) -> u8 {
        self.id().port()
    }

    /// Address of the peer.
    pub fn peer_address(&self) -> SocketAddr {
        self.address
    }

    /// What the peer sent with its request, padded with zeros.
    pub fn private_data(&self) -> &[u8] {
        &self.request.private_data
    }

    /// Accepts, with up to 196 bytes for the peer. Receives may be posted before.
    ///
    /// # Errors
    /// [`ConnectError::OtherDevice`], [`ConnectError::PrivateDataTooLong`]: found before; the request is
    /// rejected. [`ConnectError::Failed`], [`ConnectError::ConnectTimeout`]: the peer is gone.
    #[doc(alias = "rdma_accept")]
    pub fn accept(mut self, connection: &mut Connection, data: &[u8], limit: Duration) -> Result<()> {
        let until = (Instant::now(), limit);
        let address = self.address;
        check_data(data, ANSWER_DATA)?;
        check_device(self.id(), address, connection)?;
        start(self.id(), address, connection)?;
        let Some(id) = self.id.take() else { unreachable!("taken here and in reject only") };
        let ours = connection.rd_atomic();
        // What the peer starts is answered here, and the other way round.
        let both = (self.request.responder_resources.min(ours), self.request.initiator_depth.min(ours));
        id.accept(connection.pair().number(), both, data).map_err(|source| ConnectError::Failed {
            step: "accept",
            address,
            source,
        })?;
        let event = wait(&id, address, "be established", until)?;
        if event.kind != kind::ESTABLISHED {
            return Err(refused(event, address, "accept"));
        }
        connection.set_link(Link::new(id));
        Ok(())
    }

    /// Rejects, with up to 148 bytes for the peer.
    ///
    /// # Errors
    /// [`ConnectError::PrivateDataTooLong`], [`ConnectError::Failed`].
    #[doc(alias = "rdma_reject")]
    pub fn reject(mut self, data: &[u8]) -> Result<()> {
        check_data(data, REJECT_DATA)?;
        let address = self.address;
        let Some(id) = self.id.take() else { unreachable!("taken here and in accept only") };
        id.reject(data).map_err(|source| ConnectError::Failed { step: "reject", address, source }.into())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(id) = &self.id
            && let Err(error) = id.reject(&[])
        {
            tracing::debug!(%error, "cannot reject a connection");
        }
    }
}
