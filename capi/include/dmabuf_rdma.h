/*
 * libdmabuf_rdma: registers dma-bufs, GPU memory and host memory with RDMA devices, and transfers their bytes in place.
 * docs/c.md is the guide.
 *
 * Rules of every function:
 *
 * - Results. A drdma_status is DRDMA_OK, DRDMA_PENDING where the text says so, or the kind of an error. Then
 *   drdma_last_message() says what failed, why if known, and what to do next, in this thread. Places for results are
 *   written on DRDMA_OK only, unless the text says otherwise. A bug of the library is DRDMA_SYSTEM; no panic leaves it.
 * - Handles. Each function that makes a handle gives you a reference, drdma_*_ref() takes another, and drdma_*_unref()
 *   releases one. Hold a reference while you use a handle: a call must not run while another thread releases the last one.
 *   NULL, a handle whose last reference was released, also long ago, one of another type, and a pointer to anything else are
 *   refused with DRDMA_MISUSE, and never followed.
 * - Ownership. Whoever uses memory holds it. A slice, a table and a transfer in flight keep their memory registered, whatever
 *   you release, and in whatever order.
 * - Pointers. NULL is permitted only where the text says so, and refused with DRDMA_MISUSE otherwise. Other pointers must be
 *   valid for the size that the text says until the function returns. Strings end with a NUL and are UTF-8.
 * - Threads. Any thread may call any function, several at once with one handle. Functions without a timeout_ms do not wait for
 *   a peer; those that start a transfer have one and do not wait either. Beside an event loop that watches a connection's
 *   descriptor, other threads call only functions that wait: of two that look, one may consume what the other waits for.
 * - Units. Lengths and offsets are bytes. Timeouts are milliseconds; 0 does not wait, and a negative one means no limit.
 * - fork(). A child must not use the handles of its parent.
 */

#ifndef DMABUF_RDMA_H
#define DMABUF_RDMA_H

#include <stddef.h>
#include <stdint.h>

/* Of libibverbs: <infiniband/verbs.h>. */
struct ibv_mr;
struct ibv_pd;
struct ibv_qp;
struct ibv_sge;

// Length in bytes of an endpoint's description.
#define DRDMA_ENDPOINT_BYTES 44

// Maximum number of bytes in the payload of a notification.
#define DRDMA_MAX_PAYLOAD 64

// Access flags, of `enum ibv_access_flags`: the device may write, for receives, READs and results of atomics.
#define DRDMA_LOCAL_WRITE 1

// A peer may write. Needs DRDMA_LOCAL_WRITE.
#define DRDMA_REMOTE_WRITE 2

// A peer may read.
#define DRDMA_REMOTE_READ 4

// A peer may execute atomics. Needs DRDMA_LOCAL_WRITE.
#define DRDMA_REMOTE_ATOMIC 8

// The device may reorder its PCIe writes.
#define DRDMA_RELAXED_ORDERING 1048576

// All access of a peer, and DRDMA_LOCAL_WRITE.
#define DRDMA_REMOTE 15

// How a call ended: DRDMA_OK, or the kind of its error, which says what a program can do about it.
typedef enum drdma_status {
  // Success.
  DRDMA_OK = 0,
  // The arguments cannot work, or not together: correct the program.
  DRDMA_MISUSE = 1,
  // Data from outside, such as a peer's description, is damaged or inconsistent.
  DRDMA_INVALID_DATA = 2,
  // The device, its driver, the kernel or a library lacks the operation: choose another way.
  DRDMA_UNSUPPORTED = 3,
  // A device, heap, library, address or pointer does not exist.
  DRDMA_NOT_FOUND = 4,
  // This user, or this descriptor, lacks the permission.
  DRDMA_PERMISSION = 5,
  // A limit that an administrator or the caller can raise: descriptors, locked memory.
  DRDMA_LIMIT = 6,
  // The system or the device is out of memory.
  DRDMA_OUT_OF_MEMORY = 7,
  // The object is in use.
  DRDMA_BUSY = 8,
  // The timeout expired.
  DRDMA_TIMEOUT = 9,
  // The caller cancelled the operation.
  DRDMA_CANCELLED = 10,
  // The peer disconnected, rejected the connection, or does not answer.
  DRDMA_PEER_GONE = 11,
  // The device failed, was removed, or was reset.
  DRDMA_DEVICE_GONE = 12,
  // A transfer failed on the wire or at the peer, or the connection failed before.
  DRDMA_TRANSPORT = 13,
  // Any other error of the system: see drdma_last_errno().
  DRDMA_SYSTEM = 14,
  // Not ended yet, or nothing there yet. This is no error, and leaves the last error as it is.
  DRDMA_PENDING = 15,
} drdma_status;

// A table of blocks, in local memory or in a peer's. A transfer of two tables moves block `i` of one to block `i` of the
// other.
typedef struct drdma_blocks drdma_blocks;

// A reliable connection for any number of transfers in flight. After a transfer has failed it is unusable, but for the
// statuses DRDMA_CANCELLED and DRDMA_TIMEOUT as docs/transfer.md says: make a new one.
typedef struct drdma_connection drdma_connection;

// A protection domain on an open device: memory is registered in it, and connections belong to it.
typedef struct drdma_domain drdma_domain;

// A connection request.
typedef struct drdma_incoming drdma_incoming;

// A listener for connection requests on an IP address.
typedef struct drdma_listener drdma_listener;

// A queue pair of the caller's, for work requests with regions. The caller connects it and polls its completion queues.
typedef struct drdma_queue_pair drdma_queue_pair;

// A byte range of registered memory. The memory stays registered while a handle, a slice, a table or a transfer has it.
typedef struct drdma_region drdma_region;

// A byte range of a peer's memory.
typedef struct drdma_remote drdma_remote;

// A transfer in flight. It holds its memory until the device is done, whatever else is released.
typedef struct drdma_transfer drdma_transfer;

// Options of a connection. Fill it with zeros first: a field of 0 means its default.
typedef struct drdma_options {
  // Bytes of a message, 1 to 1 GiB; default 1 MiB. Both sides of a send and its receive need the same.
  uint64_t message_size;
  // Messages in flight in each direction, 1 to 65536; default 128.
  uint32_t window;
  // Messages that are posted with one call, 1 to half the window; default 16.
  uint32_t chain;
  // Receives posted ahead for the peer's notifications; default 0: none are received.
  uint32_t notifications;
  // Milliseconds without a completed message after which a transfer fails; default 30000.
  uint32_t stall_timeout_ms;
  // Not 0: poll for completions instead of sleeping.
  uint8_t busy_poll;
  // Port of the device, from 1; default 1.
  uint8_t port;
  // Traffic class of RoCE: DSCP << 2 | ECN; default 0.
  uint8_t traffic_class;
  // Service level of InfiniBand, 0 to 15; default 0.
  uint8_t service_level;
  // Bytes that an inline work request may have; default 0.
  uint32_t max_inline;
  // For later fields: 0.
  uint64_t reserved[4];
} drdma_options;

// A notification of a peer.
typedef struct drdma_notification {
  // What the peer chose.
  uint32_t id;
  // Number of bytes in the payload.
  uint32_t size;
  // The payload, and zeros.
  uint8_t payload[DRDMA_MAX_PAYLOAD];
} drdma_notification;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Connects to a listener at `peer`, "host:port", and sends it up to 52 bytes of private data (48 with notifications).
// `domain` must be on the device of the route; NULL opens that device. `options` may be NULL. It waits for the peer, at most
// `timeout_ms` milliseconds (negative: no limit).
//
// Errors: DRDMA_NOT_FOUND: the host has no address, no RDMA device has a route to it, or librdmacm is missing. DRDMA_PEER_GONE:
// nobody listens, or the peer rejected the request. DRDMA_TIMEOUT. DRDMA_MISUSE: too much private data, another device.
enum drdma_status drdma_connect(const char *peer,
                                struct drdma_domain *domain,
                                const struct drdma_options *options,
                                const void *data,
                                size_t size,
                                int64_t timeout_ms,
                                struct drdma_connection **connection);

// Listens on `local`, "host:port"; port 0 chooses a free one.
enum drdma_status drdma_listen(const char *local, struct drdma_listener **listener);

// The listener's port; 0 if the handle is refused.
uint16_t drdma_listener_port(struct drdma_listener *listener);

// The listener's descriptor, which is readable when a request may have come; -1 if the handle is refused. It stays the
// listener's.
int drdma_listener_fd(struct drdma_listener *listener);

// Takes the next connection request. With a `timeout_ms` of 0 it does not wait, and returns DRDMA_PENDING if none has come.
// Otherwise it waits so many milliseconds (negative: no limit), and then returns DRDMA_TIMEOUT.
enum drdma_status drdma_listener_accept(struct drdma_listener *listener,
                                        int64_t timeout_ms,
                                        struct drdma_incoming **incoming);

// Takes another reference.
enum drdma_status drdma_listener_ref(struct drdma_listener *listener);

// Releases a reference; NULL does nothing. Requests that were taken live on.
enum drdma_status drdma_listener_unref(struct drdma_listener *listener);

// The name of the device that received the request. Copies it to `buffer`, cut to `size` bytes with the NUL, and stores the
// whole length without the NUL in `length`, which may be NULL.
enum drdma_status drdma_incoming_device(struct drdma_incoming *incoming,
                                        char *buffer,
                                        size_t size,
                                        size_t *length);

// Accepts the request with a connection in `domain`, on the device that received it, and replies with up to 192 bytes of
// private data (188 with notifications). It waits for the peer, at most `timeout_ms` milliseconds (negative: no limit). The
// request's private data are then the connection's. `options` may be NULL.
enum drdma_status drdma_incoming_accept(struct drdma_incoming *incoming,
                                        struct drdma_domain *domain,
                                        const struct drdma_options *options,
                                        const void *data,
                                        size_t size,
                                        int64_t timeout_ms,
                                        struct drdma_connection **connection);

// Takes another reference.
enum drdma_status drdma_incoming_ref(struct drdma_incoming *incoming);

// Releases a reference; NULL does nothing. A request that was not accepted is rejected with the last one.
enum drdma_status drdma_incoming_unref(struct drdma_incoming *incoming);

// A table of `count` blocks of `length` bytes, each `stride` bytes after the one before.
enum drdma_status drdma_region_strided(struct drdma_region *region,
                                       uint64_t length,
                                       uint64_t stride,
                                       size_t count,
                                       struct drdma_blocks **blocks);

// As drdma_region_strided(), in a peer's memory.
enum drdma_status drdma_remote_strided(struct drdma_remote *remote,
                                       uint64_t length,
                                       uint64_t stride,
                                       size_t count,
                                       struct drdma_blocks **blocks);

// A table of `count` blocks of `length` bytes at these offsets in bytes, which are copied.
enum drdma_status drdma_region_blocks(struct drdma_region *region,
                                      uint64_t length,
                                      const uint64_t *offsets,
                                      size_t count,
                                      struct drdma_blocks **blocks);

// As drdma_region_blocks(), in a peer's memory.
enum drdma_status drdma_remote_blocks(struct drdma_remote *remote,
                                      uint64_t length,
                                      const uint64_t *offsets,
                                      size_t count,
                                      struct drdma_blocks **blocks);

// The blocks of a table with these indices, in this order, as a table. An index may repeat.
enum drdma_status drdma_blocks_select(struct drdma_blocks *blocks,
                                      const uint64_t *indices,
                                      size_t count,
                                      struct drdma_blocks **selected);

// Number of blocks of a table; 0 if the handle is refused.
size_t drdma_blocks_count(struct drdma_blocks *blocks);

// Takes another reference.
enum drdma_status drdma_blocks_ref(struct drdma_blocks *blocks);

// Releases a reference; NULL does nothing.
enum drdma_status drdma_blocks_unref(struct drdma_blocks *blocks);

// Makes a connection that is connected by exchanged endpoints. `options` may be NULL. It takes 5 descriptors.
enum drdma_status drdma_connection_new(struct drdma_domain *domain,
                                       const struct drdma_options *options,
                                       struct drdma_connection **connection);

// Writes the description that the peer needs to connect: DRDMA_ENDPOINT_BYTES bytes of plain data.
enum drdma_status drdma_connection_endpoint(struct drdma_connection *connection, void *buffer);

// Connects to the peer's endpoint, of DRDMA_ENDPOINT_BYTES bytes. It does not wait. The peer must connect to this one too
// before either side transfers.
enum drdma_status drdma_connection_connect(struct drdma_connection *connection,
                                           const void *endpoint);

// Ends the connection: transfers in flight end with DRDMA_TRANSPORT, and a peer that is connected by address is told.
enum drdma_status drdma_connection_disconnect(struct drdma_connection *connection);

// Makes what the peer has written into the region visible to work that a GPU starts afterwards. Memory of the host needs no
// flush. It waits for a read of the device's own.
enum drdma_status drdma_connection_flush(struct drdma_connection *connection,
                                         struct drdma_region *region);

// Writes the private data that the peer sent when it was connected by address, padded with zeros. `size` holds the size of the
// buffer, and gets the number of bytes, also if the buffer is too small (DRDMA_MISUSE) or NULL.
enum drdma_status drdma_connection_private_data(struct drdma_connection *connection,
                                                void *buffer,
                                                size_t *size);

// The descriptor for an event loop of the caller's (poll, epoll level- or edge-triggered): when it is readable, call
// drdma_connection_process(). -1 if the handle is refused. It stays the connection's, and must not be read or closed.
int drdma_connection_fd(struct drdma_connection *connection);

// Makes progress for all transfers of the connection, and arms its descriptor. It never waits. An event loop calls it once
// before it watches the descriptor, whenever that is readable, and after `next_ms` milliseconds, when the next timeout
// expires; -1 if there is none. `next_ms` may be NULL. Then ask drdma_transfer_try() and drdma_notifications_take().
enum drdma_status drdma_connection_process(struct drdma_connection *connection,
                                           int64_t *next_ms);

// Takes another reference.
enum drdma_status drdma_connection_ref(struct drdma_connection *connection);

// Releases a reference; NULL does nothing. The queue pair is destroyed once no handle of the connection or of a transfer of it
// is left, and before that nothing that a transfer in flight uses is released.
enum drdma_status drdma_connection_unref(struct drdma_connection *connection);

// The names of this machine's RDMA devices, each with a newline. Copies them to `buffer`, cut to `size` bytes with the NUL,
// and stores the whole length without the NUL in `length`, which may be NULL.
enum drdma_status drdma_devices(char *buffer,
                                size_t size,
                                size_t *length);

// Opens a device by its name and allocates a protection domain in it. NULL opens the machine's only device.
//
// Errors: DRDMA_NOT_FOUND: there is no such device, and the message compares sysfs, nodes and providers. DRDMA_UNSUPPORTED
// (ENOSYS): the kernel has no RDMA device at all. DRDMA_MISUSE: NULL, and there are several. DRDMA_PERMISSION (EACCES, EPERM): its node may not be opened. DRDMA_LIMIT
// (EMFILE), DRDMA_OUT_OF_MEMORY (ENOMEM).
enum drdma_status drdma_domain_open(const char *device,
                                    struct drdma_domain **domain);

// Uses a protection domain of the caller's. It is never deallocated here; it and its context must outlive everything made
// from the new handle.
enum drdma_status drdma_domain_from_pd(struct ibv_pd *pd,
                                       struct drdma_domain **domain);

// Takes another reference.
enum drdma_status drdma_domain_ref(struct drdma_domain *domain);

// Releases a reference; NULL does nothing. Regions and connections hold what they need of a domain.
enum drdma_status drdma_domain_unref(struct drdma_domain *domain);

// Allocates a dma-buf of at least `size` bytes: from the dma-heap called `heap`, from "system" if it is NULL, or a udmabuf if
// it is "udmabuf". Stores the descriptor, which the caller closes, and the length in bytes, whose place may be NULL.
//
// Errors: DRDMA_NOT_FOUND (ENOENT): there is no such heap, or no /dev/udmabuf. DRDMA_PERMISSION (EACCES). DRDMA_LIMIT: a
// udmabuf beyond its limits, or no descriptor is free (EMFILE). DRDMA_OUT_OF_MEMORY: more than the machine has.
enum drdma_status drdma_dmabuf_allocate(const char *heap,
                                        uint64_t size,
                                        int *fd,
                                        uint64_t *length);

// Number of handles of this process that are not released, of all types: for tests that nothing leaks.
size_t drdma_live_handles(void);

// Notifies the peer, after everything that was written before, with a payload of up to DRDMA_MAX_PAYLOAD bytes, which is
// copied. `payload` may be NULL with a `size` of 0.
enum drdma_status drdma_notify(struct drdma_connection *connection,
                               uint32_t id,
                               const void *payload,
                               size_t size,
                               int64_t timeout_ms,
                               struct drdma_transfer **transfer);

// Waits until `count` notifications of `id` have come since the last were taken, and takes them. DRDMA_TIMEOUT if they have not
// come within `timeout_ms` milliseconds (negative: no limit); then none is taken, and the connection stays usable.
enum drdma_status drdma_notifications_wait(struct drdma_connection *connection,
                                           uint32_t id,
                                           uint64_t count,
                                           int64_t timeout_ms);

// Takes the next notification, whatever its id. With a `timeout_ms` of 0 it does not wait, and returns DRDMA_PENDING if none
// has come. Otherwise it waits so many milliseconds (negative: no limit), and then returns DRDMA_TIMEOUT.
enum drdma_status drdma_notifications_take(struct drdma_connection *connection,
                                           int64_t timeout_ms,
                                           struct drdma_notification *notification);

// Uses a reliable connected (RC) queue pair of the caller's. It is never destroyed here; it and its context must outlive the
// new handle.
enum drdma_status drdma_queue_pair_from_qp(struct ibv_qp *qp,
                                           struct drdma_queue_pair **queue_pair);

// Posts one signaled work request that writes a region into the peer's memory. The completion has `wr_id`, in the send queue's
// completion queue. Until then the caller holds the region: this handle does not. Memory of several registrations at the peer,
// and more elements than the queue pair takes, are refused.
enum drdma_status drdma_queue_pair_write(struct drdma_queue_pair *queue_pair,
                                         struct drdma_region *local,
                                         struct drdma_remote *remote,
                                         uint64_t wr_id);

// As drdma_queue_pair_write(), but reads the peer's memory into a region, which needs DRDMA_LOCAL_WRITE.
enum drdma_status drdma_queue_pair_read(struct drdma_queue_pair *queue_pair,
                                        struct drdma_region *local,
                                        struct drdma_remote *remote,
                                        uint64_t wr_id);

// Posts one signaled work request that sends a region's bytes.
enum drdma_status drdma_queue_pair_send(struct drdma_queue_pair *queue_pair,
                                        struct drdma_region *local,
                                        uint64_t wr_id);

// Posts a receive into a region, which needs DRDMA_LOCAL_WRITE. The completion has `wr_id`, in the receive queue's completion
// queue.
enum drdma_status drdma_queue_pair_recv(struct drdma_queue_pair *queue_pair,
                                        struct drdma_region *local,
                                        uint64_t wr_id);

// Takes another reference.
enum drdma_status drdma_queue_pair_ref(struct drdma_queue_pair *queue_pair);

// Releases a reference; NULL does nothing. The queue pair itself stays the caller's.
enum drdma_status drdma_queue_pair_unref(struct drdma_queue_pair *queue_pair);

// Registers bytes `offset` to `offset + length` of a dma-buf; a length of 0 means to its end. `access` are DRDMA_LOCAL_WRITE
// and its like; 0 permits the device only to read. The descriptor stays the caller's, and may be closed afterwards.
//
// Errors: DRDMA_MISUSE: no dma-buf, a range outside of it, flags that exclude each other. DRDMA_PERMISSION: flags that permit
// writing, and a read-only descriptor. DRDMA_UNSUPPORTED (EOPNOTSUPP): the device imports no dma-bufs, not this memory, or not
// with these flags; the message says which. DRDMA_OUT_OF_MEMORY (ENOMEM), DRDMA_SYSTEM: see the errno.
enum drdma_status drdma_register_dmabuf(struct drdma_domain *domain,
                                        int fd,
                                        uint64_t offset,
                                        uint64_t length,
                                        uint32_t access,
                                        struct drdma_region **region);

// Registers `length` bytes of host memory. `release`, if it is not NULL, is called once with `context`, on any thread, when
// no region and no transfer uses the memory any more; until then nobody may free or unmap it. If the registration fails, it is
// called before the function returns. It must not throw, nor use or release a handle that the call uses in which it runs.
// Without it, the memory must stay until the last handle of it is released and every transfer of it has ended; if a receive
// was cancelled, timed out or released before its first message, until its connection is released too.
//
// Errors: DRDMA_MISUSE: no bytes, or flags that exclude each other. DRDMA_LIMIT (ENOMEM, EPERM): RLIMIT_MEMLOCK; the message
// says the limit and the need.
enum drdma_status drdma_register_host(struct drdma_domain *domain,
                                      void *start,
                                      uint64_t length,
                                      uint32_t access,
                                      void (*release)(void *context),
                                      void *context,
                                      struct drdma_region **region);

// Registers memory of a GPU by the pointer of a runtime that this process has loaded: CUDA, ROCm or Level Zero. The domain
// exports and registers the allocation under the pointer once, and keeps that until it is released. The memory must stay
// allocated as long as host memory without a `release`.
//
// Errors: DRDMA_NOT_FOUND: no runtime is loaded, or none knows the pointer. DRDMA_MISUSE: the range leaves the allocation.
// DRDMA_UNSUPPORTED: this kind of memory is not exported; and as drdma_register_dmabuf().
enum drdma_status drdma_register_pointer(struct drdma_domain *domain,
                                         uint64_t pointer,
                                         uint64_t length,
                                         uint32_t access,
                                         struct drdma_region **region);

// Uses a memory region that the caller registered with `access`. It is never deregistered here, and must outlive the new
// handle and everything made from it. `iova` is the address of its first byte in work requests: what was passed as iova to
// the registration, or the address of the memory for ibv_reg_mr(). `mr->addr` is another one for a dma-buf.
enum drdma_status drdma_region_from_mr(struct ibv_mr *mr,
                                       uint64_t iova,
                                       uint32_t access,
                                       struct drdma_region **region);

// Takes another reference.
enum drdma_status drdma_region_ref(struct drdma_region *region);

// Releases a reference; NULL does nothing. The memory is deregistered once no handle, slice, table or transfer has it.
enum drdma_status drdma_region_unref(struct drdma_region *region);

// Bytes `offset` to `offset + length` of a region, as a region.
enum drdma_status drdma_region_slice(struct drdma_region *region,
                                     uint64_t offset,
                                     uint64_t length,
                                     struct drdma_region **slice);

// Length of a region in bytes; 0 if the handle is refused.
uint64_t drdma_region_length(struct drdma_region *region);

// The scatter/gather element of a region, for work requests of the caller's own. A region that has more than 4 GiB less 4 KiB,
// or memory of several registrations, is refused: slice it.
enum drdma_status drdma_region_element(struct drdma_region *region,
                                       struct ibv_sge *element);

// Writes the description that a peer needs to access the region: 32 bytes, and 20 for each memory region behind it. `size`
// holds the size of the buffer, and gets the number of bytes, also if the buffer is too small (DRDMA_MISUSE) or NULL.
enum drdma_status drdma_region_describe(struct drdma_region *region,
                                        void *buffer,
                                        size_t *size);

// Parses a peer's description (drdma_region_describe()) at the start of `bytes`. What follows it is ignored, such as the
// padding of private data. The bytes need not be trusted.
//
// Errors: DRDMA_INVALID_DATA: they are cut, damaged, of another version, or describe what cannot be.
enum drdma_status drdma_remote_parse(const void *bytes,
                                     size_t size,
                                     struct drdma_remote **remote);

// Takes another reference.
enum drdma_status drdma_remote_ref(struct drdma_remote *remote);

// Releases a reference; NULL does nothing.
enum drdma_status drdma_remote_unref(struct drdma_remote *remote);

// Bytes `offset` to `offset + length` of a peer's memory.
enum drdma_status drdma_remote_slice(struct drdma_remote *remote,
                                     uint64_t offset,
                                     uint64_t length,
                                     struct drdma_remote **slice);

// Length of a peer's memory in bytes; 0 if the handle is refused.
uint64_t drdma_remote_length(struct drdma_remote *remote);

// The name of a status, such as "DRDMA_MISUSE", for a log. It is static; "unknown" for any other number.
const char *drdma_status_name(int status);

// The status of the last call of this thread that failed; DRDMA_OK if none has.
enum drdma_status drdma_last_status(void);

// The message of this thread's last error with its causes: what failed, why if known, and what to do next. Copies it to
// `buffer`, cut to `size` bytes with the NUL, and returns its whole length without the NUL: 0 if no call has failed.
// `buffer` may be NULL.
size_t drdma_last_message(char *buffer,
                          size_t size);

// What to do about this thread's last error, in a sentence; otherwise like drdma_last_message().
size_t drdma_last_hint(char *buffer, size_t size);

// The errno behind this thread's last error; 0 if it has none.
int drdma_last_errno(void);

// Writes a region into the peer's memory, which has the same length. `timeout_ms` limits the whole transfer, in milliseconds;
// negative means no limit but the stall timeout. It starts the transfer and does not wait, as all functions here with a
// `transfer` do.
//
// Errors of all that start a transfer: DRDMA_MISUSE: different lengths, a region of another domain or without the right that
// the operation needs, a peer's memory that does not permit it, a connection that is not connected yet. DRDMA_TRANSPORT: the
// connection failed before.
//
// A transfer whose time is up after some of its messages were posted leaves the connection unusable: make a new one.
enum drdma_status drdma_write(struct drdma_connection *connection,
                              struct drdma_region *local,
                              struct drdma_remote *remote,
                              int64_t timeout_ms,
                              struct drdma_transfer **transfer);

// Like drdma_write(), and notifies the peer with `id` once all bytes are in its memory.
enum drdma_status drdma_write_notify(struct drdma_connection *connection,
                                     struct drdma_region *local,
                                     struct drdma_remote *remote,
                                     uint32_t id,
                                     int64_t timeout_ms,
                                     struct drdma_transfer **transfer);

// Reads the peer's memory into a region of the same length, which needs DRDMA_LOCAL_WRITE.
enum drdma_status drdma_read(struct drdma_connection *connection,
                             struct drdma_region *local,
                             struct drdma_remote *remote,
                             int64_t timeout_ms,
                             struct drdma_transfer **transfer);

// Writes each block of a table in a region into the block of a table in the peer's memory with the same index and length.
enum drdma_status drdma_write_blocks(struct drdma_connection *connection,
                                     struct drdma_blocks *local,
                                     struct drdma_blocks *remote,
                                     int64_t timeout_ms,
                                     struct drdma_transfer **transfer);

// Like drdma_write_blocks(), and notifies the peer with `id` once all bytes are in its memory.
enum drdma_status drdma_write_blocks_notify(struct drdma_connection *connection,
                                            struct drdma_blocks *local,
                                            struct drdma_blocks *remote,
                                            uint32_t id,
                                            int64_t timeout_ms,
                                            struct drdma_transfer **transfer);

// Reads each of the peer's blocks into the block of a table in a region with the same index and length.
enum drdma_status drdma_read_blocks(struct drdma_connection *connection,
                                    struct drdma_blocks *local,
                                    struct drdma_blocks *remote,
                                    int64_t timeout_ms,
                                    struct drdma_transfer **transfer);

// Sends a region's bytes to a peer that receives as many.
enum drdma_status drdma_send(struct drdma_connection *connection,
                             struct drdma_region *local,
                             int64_t timeout_ms,
                             struct drdma_transfer **transfer);

// Receives as many bytes as the region has, which needs DRDMA_LOCAL_WRITE. Start it before the peer sends. After
// DRDMA_TIMEOUT or DRDMA_CANCELLED before its first message it stays posted, so that the peer may still write the memory;
// receive into the same memory again, or release the connection. Only one thread may wait for it.
enum drdma_status drdma_recv(struct drdma_connection *connection,
                             struct drdma_region *local,
                             int64_t timeout_ms,
                             struct drdma_transfer **transfer);

// Adds to a 64-bit integer of the peer at a multiple of 8, and returns its previous value in the 8 bytes of `local`, in this
// machine's byte order.
enum drdma_status drdma_fetch_add(struct drdma_connection *connection,
                                  struct drdma_region *local,
                                  struct drdma_remote *remote,
                                  uint64_t add,
                                  int64_t timeout_ms,
                                  struct drdma_transfer **transfer);

// Replaces a 64-bit integer of the peer at a multiple of 8 with `swap` if it equals `compare`, and returns its previous value in
// the 8 bytes of `local`.
enum drdma_status drdma_compare_swap(struct drdma_connection *connection,
                                     struct drdma_region *local,
                                     struct drdma_remote *remote,
                                     uint64_t compare,
                                     uint64_t swap,
                                     int64_t timeout_ms,
                                     struct drdma_transfer **transfer);

// Waits until the transfer ends, for at most `timeout_ms` milliseconds; negative means no limit. DRDMA_OK if it has completed,
// DRDMA_PENDING if it is in flight then and goes on, else how it failed. `bytes`, which may be NULL, gets its length. Any
// thread may wait for any transfer, also several for one.
//
// Errors: DRDMA_TIMEOUT: its own timeout or the stall timeout expired. DRDMA_CANCELLED. DRDMA_TRANSPORT: a message failed, and
// the message says why. DRDMA_PEER_GONE: the peer disconnected. DRDMA_DEVICE_GONE.
enum drdma_status drdma_transfer_wait(struct drdma_transfer *transfer,
                                      int64_t timeout_ms,
                                      uint64_t *bytes);

// Whether the transfer has ended: DRDMA_OK, DRDMA_PENDING, or how it failed. It never waits.
enum drdma_status drdma_transfer_try(struct drdma_transfer *transfer);

// Cancels the transfer: no further message is posted, and those in flight complete. Then it ends with DRDMA_CANCELLED, or with
// DRDMA_OK if these were all, and the connection stays usable. For a receive see drdma_recv(); after its first message the
// connection becomes unusable.
enum drdma_status drdma_transfer_cancel(struct drdma_transfer *transfer);

// Bytes in messages that have completed; 0 if the handle is refused.
uint64_t drdma_transfer_progress(struct drdma_transfer *transfer);

// Takes another reference.
enum drdma_status drdma_transfer_ref(struct drdma_transfer *transfer);

// Releases a reference; NULL does nothing. A transfer whose last reference is released goes on, and its error is lost.
enum drdma_status drdma_transfer_unref(struct drdma_transfer *transfer);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DMABUF_RDMA_H */
