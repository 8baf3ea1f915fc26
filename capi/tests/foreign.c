/* A protection domain, memory regions and queue pairs that this program made with libibverbs. */
#include <infiniband/verbs.h>

#include "harness.h"

enum { SIZE = 4096 };

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;

static struct ibv_qp *queue_pair(enum ibv_qp_type type)
{
	struct ibv_qp_init_attr attr = { .send_cq = cq, .recv_cq = cq, .qp_type = type,
					 .cap = { 8, 8, 2, 2, 0 } };

	return ibv_create_qp(pd, &attr);
}

/* Connects two queue pairs of rxe0, as ibv_rc_pingpong does. */
static void bring_up(struct ibv_qp *qp, struct ibv_qp *peer)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT, .port_num = 1,
				    .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	struct ibv_gid_entry entries[8];
	ssize_t count = ibv_query_gid_table(context, entries, 8, 0), at = 0;

	/* The one of the IPv4 address. */
	while (at < count && !(entries[at].gid_type == IBV_GID_TYPE_ROCE_V2 && entries[at].gid.raw[10] == 0xff))
		at++;
	CHECK(at < count);
	CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = peer->qp_num, .max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr = { .is_global = 1, .port_num = 1,
			     .grh = { .dgid = entries[at].gid, .sgid_index = (uint8_t)entries[at].gid_index, .hop_limit = 1 } },
	};
	CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
						IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	attr = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7,
				     .max_rd_atomic = 1 };
	CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
						IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

static void completes(uint64_t wr_id)
{
	struct ibv_wc wc;

	while (!ibv_poll_cq(cq, 1, &wc))
		;
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == wr_id);
}

/* This program's domain and region, and the library's connections. */
static void a_domain_and_a_region(void)
{
	static unsigned char ours[SIZE], theirs[SIZE];
	struct ibv_mr *mr = ibv_reg_mr(pd, ours, SIZE, 0);
	drdma_domain *domain, *far_domain;
	drdma_connection *near, *far;
	drdma_region *region, *part, *target;
	drdma_remote *remote, *place;
	drdma_transfer *transfer;
	struct ibv_sge element;

	fill(ours, SIZE, 1);
	CHECK(mr);
	OK(drdma_domain_from_pd(pd, &domain));
	OK(drdma_region_from_mr(mr, (uintptr_t)ours, 0, &region));
	MISUSE(drdma_region_from_mr(mr, UINT64_MAX, 0, &part), "does not fit");
	MISUSE(drdma_region_from_mr(mr, 0, DRDMA_REMOTE_WRITE, &part), "LOCAL_WRITE");
	OK(drdma_region_slice(region, 100, 50, &part));
	OK(drdma_region_element(part, &element));
	CHECK(element.addr == (uintptr_t)ours + 100 && element.length == 50 && element.lkey == mr->lkey);

	OK(drdma_domain_open("rxe1", &far_domain));
	OK(drdma_register_host(far_domain, theirs, SIZE, DRDMA_REMOTE, NULL, NULL, &target));
	OK(drdma_connection_new(domain, NULL, &near));
	OK(drdma_connection_new(far_domain, NULL, &far));
	join(near, far);
	remote = described(target);
	OK(drdma_write(near, region, remote, -1, &transfer));
	finish(transfer, SIZE);
	CHECK(!memcmp(ours, theirs, SIZE));
	/* It needs the right to be written. */
	MISUSE(drdma_read(near, region, remote, -1, &transfer), "LOCAL_WRITE");
	OK(drdma_remote_slice(remote, 1, 50, &place));
	OK(drdma_write(near, part, place, -1, &transfer));
	finish(transfer, 50);
	CHECK(!memcmp(ours + 100, theirs + 1, 50));
	/* The far connection's domain is another one. */
	MISUSE(drdma_send(far, region, -1, &transfer), "domain");

	OK(drdma_connection_unref(near));
	OK(drdma_connection_unref(far));
	OK(drdma_region_unref(target));
	OK(drdma_region_unref(part));
	OK(drdma_region_unref(region));
	OK(drdma_remote_unref(remote));
	OK(drdma_remote_unref(place));
	OK(drdma_domain_unref(far_domain));
	OK(drdma_domain_unref(domain));
	/* All are this program's still. */
	CHECK(!ibv_dereg_mr(mr));
}

/* This program's queue pairs, and the library's regions. */
static void a_queue_pair(void)
{
	static unsigned char ours[SIZE], theirs[SIZE];
	struct ibv_qp *one = queue_pair(IBV_QPT_RC), *other = queue_pair(IBV_QPT_RC), *datagrams = queue_pair(IBV_QPT_UD);
	drdma_queue_pair *near, *far, *none;
	drdma_domain *domain, *strange;
	drdma_region *from, *target, *part, *elsewhere;
	drdma_remote *remote, *piece;

	bring_up(one, other);
	bring_up(other, one);
	OK(drdma_domain_from_pd(pd, &domain));
	OK(drdma_queue_pair_from_qp(one, &near));
	OK(drdma_queue_pair_from_qp(other, &far));
	REFUSED(drdma_queue_pair_from_qp(datagrams, &none), DRDMA_UNSUPPORTED, "RC");
	OK(drdma_register_host(domain, ours, SIZE, DRDMA_REMOTE, NULL, NULL, &from));
	OK(drdma_register_host(domain, theirs, SIZE, DRDMA_REMOTE, NULL, NULL, &target));
	remote = described(target);

	fill(ours, SIZE, 2);
	OK(drdma_queue_pair_write(near, from, remote, 7));
	completes(7);
	CHECK(!memcmp(ours, theirs, SIZE));
	fill(theirs, SIZE, 3);
	OK(drdma_queue_pair_read(near, from, remote, 8));
	completes(8);
	CHECK(!memcmp(ours, theirs, SIZE));
	fill(ours, SIZE, 4);
	OK(drdma_queue_pair_recv(far, target, 9));
	OK(drdma_queue_pair_send(near, from, 9));
	completes(9);
	completes(9);
	CHECK(!memcmp(ours, theirs, SIZE));

	OK(drdma_region_slice(from, 0, 10, &part));
	MISUSE(drdma_queue_pair_write(near, part, remote, 1), "10 bytes");
	MISUSE(drdma_queue_pair_read(near, part, remote, 1), "10 bytes");
	OK(drdma_domain_open("rxe0", &strange));
	OK(drdma_register_host(strange, ours, SIZE, DRDMA_REMOTE, NULL, NULL, &elsewhere));
	MISUSE(drdma_queue_pair_write(near, elsewhere, remote, 1), "domain");
	OK(drdma_remote_slice(remote, 0, 10, &piece));
	MISUSE(drdma_queue_pair_write(near, NULL, remote, 1), "NULL");
	MISUSE(drdma_queue_pair_write(near, from, NULL, 1), "NULL");
	MISUSE(drdma_queue_pair_send(near, NULL, 1), "NULL");
	MISUSE(drdma_queue_pair_recv(near, NULL, 1), "NULL");
	MISUSE(drdma_queue_pair_from_qp(one, NULL), "place");

	OK(drdma_queue_pair_ref(near));
	OK(drdma_queue_pair_unref(near));
	OK(drdma_queue_pair_unref(near));
	OK(drdma_queue_pair_unref(far));
	MISUSE(drdma_queue_pair_unref(far), "was released");
	MISUSE(drdma_queue_pair_ref(far), "was released");
	MISUSE(drdma_queue_pair_write(far, from, remote, 1), "was released");
	MISUSE(drdma_queue_pair_read(far, from, remote, 1), "was released");
	MISUSE(drdma_queue_pair_send(far, from, 1), "was released");
	MISUSE(drdma_queue_pair_recv(far, from, 1), "was released");
	OK(drdma_region_unref(from));
	OK(drdma_region_unref(target));
	OK(drdma_region_unref(part));
	OK(drdma_region_unref(elsewhere));
	OK(drdma_remote_unref(remote));
	OK(drdma_remote_unref(piece));
	OK(drdma_domain_unref(strange));
	OK(drdma_domain_unref(domain));
	CHECK(!ibv_destroy_qp(one) && !ibv_destroy_qp(other) && !ibv_destroy_qp(datagrams));
}

int main(void)
{
	int count;
	struct ibv_device **devices = ibv_get_device_list(&count);

	for (int i = 0; i < count; i++)
		if (!strcmp(ibv_get_device_name(devices[i]), "rxe0"))
			context = ibv_open_device(devices[i]);
	CHECK(context);
	ibv_free_device_list(devices);
	CHECK((pd = ibv_alloc_pd(context)) && (cq = ibv_create_cq(context, 32, NULL, NULL, 0)));
	RUN(a_domain_and_a_region);
	RUN(a_queue_pair);
	CHECK(!ibv_destroy_cq(cq) && !ibv_dealloc_pd(pd) && !ibv_close_device(context));
	return 0;
}
