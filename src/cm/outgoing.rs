//! The side that asks for a connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rdma_sys_ext::rdma_cm::event as kind;

use super::raw::{Id, Link};
use super::{REQUEST_DATA, check_data, check_device, refused, start, wait};
use crate::Result;
use crate::error::ConnectError;
use crate::transfer::Connection;

/// A way to a peer, found and not yet gone: it names the device to make a connection on.
pub struct Outgoing {
    id: Id,
    address: SocketAddr,
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Outgoing {
    /// Finds the device and the route to an address. `source` is an address of this host to go from;
    /// `None` lets the routing choose.
    ///
    /// # Errors
    /// [`ConnectError::NoManager`], [`ConnectError::Address`], [`ConnectError::Route`],
    /// [`ConnectError::ConnectTimeout`].
    #[doc(alias("rdma_resolve_addr", "rdma_resolve_route"))]
    pub fn resolve(address: SocketAddr, source: Option<SocketAddr>, limit: Duration) -> Result<Self> {
        let until = (Instant::now(), limit);
        let id = Id::new().map_err(|source| ConnectError::NoManager { source })?;
        id.resolve_address(source, address, limit)
            .map_err(|source| ConnectError::Address { address, source })?;
        let step = "resolve the address";
        let event = wait(&id, address, step, until)?;
        if event.kind != kind::ADDR_RESOLVED {
            return Err(refused(event, address, step));
        }
        id.resolve_route(limit).map_err(|source| ConnectError::Route { address, source })?;
        let step = "resolve the route";
        let event = wait(&id, address, step, until)?;
        if event.kind != kind::ROUTE_RESOLVED {
            return Err(refused(event, address, step));
        }
        Ok(Self { id, address })
    }

    /// Name of the device that the way goes through.
    pub fn device_name(&self) -> String {
        self.id.device_name()
    }

    /// Port of that device.
    pub fn port(&self) -> u8 {
        self.id.port()
    }

    /// Address of this side.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.id.local_address()
    }

    /// Connects, with up to 56 bytes for the peer, and returns what the peer sent with its answer,
    /// padded with zeros. Receives may be posted before.
    ///
    /// # Errors
    /// [`ConnectError::OtherDevice`], [`ConnectError::PrivateDataTooLong`]: found before.
    /// [`ConnectError::Rejected`], [`ConnectError::Unreachable`], [`ConnectError::ConnectTimeout`],
    /// [`ConnectError::Failed`].
    #[doc(alias("rdma_connect", "rdma_establish"))]
    pub fn connect(self, connection: &mut Connection, data: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let Self { id, address } = self;
        let until = (Instant::now(), limit);
        check_data(data, REQUEST_DATA)?;
        check_device(&id, address, connection)?;
        let failed = |step| move |source| ConnectError::Failed { step, address, source };
        let (qp_num, rd_atomic) = (connection.pair().number(), connection.rd_atomic());
        id.connect(qp_num, rd_atomic, data).map_err(failed("ask for"))?;
        let step = "be accepted";
        let event = wait(&id, address, step, until)?;
        if event.kind != kind::CONNECT_RESPONSE {
            return Err(refused(event, address, "ask for"));
        }
        start(&id, address, connection)?;
        id.establish().map_err(failed("establish"))?;
        connection.set_link(Link::new(id));
        Ok(event.private_data)
    }
}
