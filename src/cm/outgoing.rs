//! The active side: it requests a connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rdma_sys_ext::rdma_cm::event as kind;

use super::error::{Error, Result};
use super::raw::{CmLink, Id};
use super::statement::Statement;
use super::{ANSWER, REQUEST};
use super::{Connecting, Wait, block, check_data, check_device, no_manager, own_statement, refused, start};
use crate::transfer::Connection;

/// A resolved route to a peer, which names the device and port to create a [`Connection`] on.
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
    /// Resolves an address to a device and a route. `source` is the address of this host to use; with `None` the
    /// routing chooses.
    ///
    /// # Errors
    /// - [`Error::NoManager`]: librdmacm, the kernel module rdma_ucm, access to its device, or any RDMA device is
    ///   missing; `EMFILE` if no descriptor is free.
    /// - [`Error::Address`]: `ENODEV` if no RDMA device leads to the address; `ENETUNREACH`, `EHOSTUNREACH`,
    ///   `EADDRNOTAVAIL`, `ETIMEDOUT`.
    /// - [`Error::Route`]: the fabric has no route to the address.
    /// - [`Error::Timeout`]: no reply within `timeout`.
    /// - [`Error::Failed`]: the device was removed, or librdmacm failed.
    #[doc(alias("rdma_resolve_addr", "rdma_resolve_route"))]
    pub fn resolve(address: SocketAddr, source: Option<SocketAddr>, timeout: Duration) -> Result<Self> {
        block(Self::resolve_by(Wait::Block, address, source, None, timeout))
    }

    /// Like [`resolve`](Self::resolve), without blocking the thread of a tokio runtime.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn resolve_async(
        address: SocketAddr,
        source: Option<SocketAddr>,
        timeout: Duration,
    ) -> Result<Self> {
        Self::resolve_by(Wait::Tokio, address, source, None, timeout).await
    }

    /// Like [`resolve`](Self::resolve), for a route with a traffic class: on RoCE v2 the DS field of the IP header, DSCP ×
    /// 4 + ECN. The connection manager's own messages carry it too, and so do both sides' packets, unless
    /// [`traffic_class`](crate::verbs::QueuePairOptions::traffic_class) of the connection chooses another one. On
    /// RoCE the kernel derives the service level from it.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    #[doc(alias = "RDMA_OPTION_ID_TOS")]
    pub fn resolve_with_traffic_class(
        address: SocketAddr,
        source: Option<SocketAddr>,
        traffic_class: u8,
        timeout: Duration,
    ) -> Result<Self> {
        block(Self::resolve_by(Wait::Block, address, source, Some(traffic_class), timeout))
    }

    async fn resolve_by(
        how: Wait,
        address: SocketAddr,
        source: Option<SocketAddr>,
        traffic_class: Option<u8>,
        timeout: Duration,
    ) -> Result<Self> {
        let until = (Instant::now(), timeout);
        let id = Id::new().map_err(no_manager)?;
        if let Some(class) = traffic_class {
            let step = "set the traffic class";
            id.set_traffic_class(class).map_err(|source| Error::Failed { step, address, source })?;
        }
        id.resolve_address(source, address, timeout).map_err(|source| Error::Address { address, source })?;
        how.expect(kind::ADDR_RESOLVED, &id, address, "resolve the address", until).await?;
        id.resolve_route(timeout).map_err(|source| Error::Route { address, source })?;
        how.expect(kind::ROUTE_RESOLVED, &id, address, "resolve the route", until).await?;
        Ok(Self { id, address })
    }

    /// The device of the route. Create the [`Connection`] on it.
    pub fn device_name(&self) -> String {
        self.id.device_name()
    }

    /// The port of that device.
    pub fn port(&self) -> u8 {
        self.id.port()
    }

    /// The address of this side; `None` if the kernel does not state it.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.id.local_address()
    }

    /// Requests the connection with up to 52 bytes of private data, 48 with notifications, and connects `connection`. Returns the private
    /// data of the peer's reply, padded with zeros. Receives may be posted before.
    ///
    /// # Errors
    /// - [`Error::OtherDevice`]: the connection is on another device or port than the route.
    /// - [`Error::PrivateDataTooLong`]: more bytes.
    /// - [`Error::MtuMismatch`]: the peer uses another library, and a larger MTU than this side's port carries.
    /// - [`Error::Verbs`]: the queue pair cannot be brought to INIT, RTR or RTS: `EINVAL` if it is connected already.
    /// - [`Error::Rejected`]: the peer rejected the request.
    /// - [`Error::Unreachable`]: the peer did not answer the kernel's retries.
    /// - [`Error::Timeout`]: no reply within `timeout`.
    /// - [`Error::Failed`]: the kernel failed.
    #[doc(alias("rdma_connect", "rdma_establish"))]
    pub fn connect(self, connection: &mut Connection, data: &[u8], timeout: Duration) -> Result<Vec<u8>> {
        block(self.connect_by(Wait::Block, connection, data, timeout))
    }

    /// Like [`connect`](Self::connect), without blocking the thread of a tokio runtime. If the future is dropped before
    /// it is done, the connection cannot be used any more.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn connect_async(
        self,
        connection: &mut Connection,
        data: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>> {
        self.connect_by(Wait::Tokio, connection, data, timeout).await
    }

    async fn connect_by(
        self,
        how: Wait,
        connection: &mut Connection,
        data: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>> {
        let Self { id, address } = self;
        let until = (Instant::now(), timeout);
        check_device(&id, address, connection)?;
        let own = own_statement(connection)?;
        check_data(data, REQUEST - own.size())?;
        let failed = |step| move |source| Error::Failed { step, address, source };
        let (qp_num, depth) = (connection.queue_pair().number(), connection.depth());
        let data = own.append(data, REQUEST);
        id.connect(qp_num, depth, &data).map_err(failed("request the connection"))?;
        let step = "receive a reply";
        let mut event = how.event(&id, address, step, until).await?;
        let peer = Statement::take(&mut event.private_data, ANSWER);
        match event.kind {
            kind::CONNECT_RESPONSE => {
                start(&id, address, connection, (own, peer))?;
                let connecting = Connecting(connection);
                id.establish().map_err(failed("establish the connection"))?;
                connecting.established();
            }
            // The kernel's iWARP connection manager has brought the queue pair up by itself.
            kind::ESTABLISHED if connection.domain().context().is_iwarp() => {}
            _ => return Err(refused(event, address, step)),
        }
        connection.set_link(Box::new(CmLink::new(id)));
        Ok(event.private_data)
    }
}
