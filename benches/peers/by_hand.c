/* The least that writes blocks with a queue pair, for peers.rs to measure the library against: work requests
 * in chains, the last of each signaled, no check of anything but errors.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include <infiniband/verbs.h>

#define POLLED 16

/* Sleeps until the queue has completions. */
static int sleep_for(struct ibv_cq *cq)
{
	struct pollfd channel = { .fd = cq->channel->fd, .events = POLLIN };
	struct ibv_cq *of;
	void *context;

	if (poll(&channel, 1, -1) < 0)
		return errno == EINTR ? 0 : -errno;
	if (ibv_get_cq_event(cq->channel, &of, &context))
		return -errno;
	ibv_ack_cq_events(cq, 1);
	return 0;
}

/* One block from `local[i]` to `remote[i]` for each i. Returns nanoseconds from the first post to the last
 * completion, or a negative errno; EIO for a work request that failed. Polls without a pause unless `asleep`.
 */
int64_t bare_write_blocks(struct ibv_qp *qp, struct ibv_cq *cq, uint32_t lkey, uint32_t rkey,
			  const uint64_t *local, const uint64_t *remote, uint64_t count, uint32_t size,
			  uint64_t window, uint64_t chain, int asleep)
{
	struct ibv_send_wr *wrs = calloc(chain, sizeof(*wrs)), *bad;
	struct ibv_sge *sges = calloc(chain, sizeof(*sges));
	struct ibv_wc wcs[POLLED];
	struct timespec start, end;
	uint64_t posted = 0, done = 0;
	int64_t failed = 0;
	int armed = 0;

	if (!wrs || !sges) {
		free(wrs);
		free(sges);
		return -ENOMEM;
	}
	for (uint64_t i = 0; i < chain; i++) {
		sges[i].length = size;
		sges[i].lkey = lkey;
		wrs[i].sg_list = &sges[i];
		wrs[i].num_sge = 1;
		wrs[i].opcode = IBV_WR_RDMA_WRITE;
		wrs[i].wr.rdma.rkey = rkey;
	}
	clock_gettime(CLOCK_MONOTONIC, &start);
	while (done < count && !failed) {
		while (posted < count && posted - done + chain <= window) {
			uint64_t many = count - posted < chain ? count - posted : chain;

			for (uint64_t i = 0; i < many; i++) {
				sges[i].addr = local[posted + i];
				wrs[i].wr.rdma.remote_addr = remote[posted + i];
				wrs[i].next = i + 1 < many ? &wrs[i + 1] : NULL;
				wrs[i].send_flags = i + 1 < many ? 0 : IBV_SEND_SIGNALED;
			}
			posted += many;
			wrs[many - 1].wr_id = posted;
			failed = -ibv_post_send(qp, wrs, &bad);
			if (failed)
				break;
		}
		int polled = ibv_poll_cq(cq, POLLED, wcs);

		if (polled < 0)
			failed = -EIO;
		if (polled == 0 && asleep) {
			/* A completion between the poll and the arming raises no event, so poll again before sleeping. */
			failed = armed ? sleep_for(cq) : -ibv_req_notify_cq(cq, 0);
			armed = !armed;
		}
		for (int i = 0; i < polled; i++) {
			if (wcs[i].status != IBV_WC_SUCCESS)
				failed = -EIO;
			else
				done = wcs[i].wr_id;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	free(wrs);
	free(sges);
	if (failed)
		return failed;
	return (end.tv_sec - start.tv_sec) * INT64_C(1000000000) + (end.tv_nsec - start.tv_nsec);
}
