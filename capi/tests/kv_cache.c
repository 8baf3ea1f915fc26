/*
 * One side of the protocol of examples/kv_cache, for peers in other languages.
 *
 *   kv_cache decode|prefill HOST PORT LAYERS PAGES PAGE_SIZE
 */
#include "harness.h"

enum { SPARE = 2, TIMEOUT = 60000 };

static uint32_t layers, pages;
static uint64_t page_size;

/* XXH64 with seed 0, of bytes whose number is a multiple of 32. */
static const uint64_t P1 = 0x9e3779b185ebca87, P2 = 0xc2b2ae3d27d4eb4f, P3 = 0x165667b19e3779f9, P4 = 0x85ebca77c2b2ae63;

static uint64_t turned(uint64_t word, int by)
{
	return word << by | word >> (64 - by);
}

static uint64_t mixed(uint64_t sum, uint64_t word)
{
	return turned(sum + word * P2, 31) * P1;
}

static uint64_t digest(const unsigned char *bytes, uint64_t length)
{
	uint64_t sums[4] = { P1 + P2, P2, 0, -P1 }, all, word;

	CHECK(length >= 32 && length % 32 == 0);
	for (uint64_t at = 0; at < length; at += 8) {
		memcpy(&word, bytes + at, 8);
		sums[at / 8 % 4] = mixed(sums[at / 8 % 4], word);
	}
	all = turned(sums[0], 1) + turned(sums[1], 7) + turned(sums[2], 12) + turned(sums[3], 18);
	for (int i = 0; i < 4; i++)
		all = (all ^ mixed(0, sums[i])) * P1 + P4;
	all += length;
	all = (all ^ all >> 33) * P2;
	all = (all ^ all >> 29) * P3;
	return all ^ all >> 32;
}

static void compute(unsigned char *page, uint32_t layer, uint32_t at)
{
	uint64_t seed = ((uint64_t)layer << 32 | at) * 0x9e3779b97f4a7c15 | 1;

	for (uint64_t word = 1; word <= page_size / 8; word++) {
		uint64_t value = seed * (2 * word + 1);

		memcpy(page + 8 * (word - 1), &value, 8);
	}
}

/* The peer may leave once it has the last message, before its acknowledgement is here. It tells by what it prints. */
static void finish_layer(drdma_transfer *transfer, uint64_t expected, uint32_t layer)
{
	drdma_status status = drdma_transfer_wait(transfer, TIMEOUT, NULL);

	CHECK(status == DRDMA_OK || (status == DRDMA_PEER_GONE && layer + 1 == layers));
	CHECK(status != DRDMA_OK || drdma_transfer_progress(transfer) == expected);
	OK(drdma_transfer_unref(transfer));
}

/* The same for the peer: stays until it has gone, or for a while. */
static void linger(drdma_connection *connection, int64_t while_ms)
{
	drdma_notification more;

	CHECK(drdma_notifications_take(connection, while_ms, &more) != DRDMA_OK);
}

static void decode(const char *address)
{
	drdma_options options = { .notifications = layers + 1 };
	uint64_t size = (uint64_t)layers * pages * SPARE * page_size;
	unsigned char *cache = calloc(1, size), *ordered = malloc(pages * page_size), *page = malloc(page_size);
	uint32_t *chosen = malloc(4 * pages);
	unsigned char description[64];
	size_t length = sizeof description;
	drdma_listener *listener;
	drdma_incoming *incoming;
	drdma_domain *domain;
	drdma_region *region, *message;
	drdma_connection *connection;
	drdma_transfer *transfer;
	char device[64];

	OK(drdma_listen(address, &listener));
	printf("listening\n");
	fflush(stdout);
	OK(drdma_listener_accept(listener, TIMEOUT, &incoming));
	OK(drdma_incoming_device(incoming, device, sizeof device, NULL));
	OK(drdma_domain_open(device, &domain));
	OK(drdma_register_host(domain, cache, size, DRDMA_REMOTE, NULL, NULL, &region));
	OK(drdma_region_describe(region, description, &length));
	OK(drdma_incoming_accept(incoming, domain, &options, description, length, TIMEOUT, &connection));
	for (uint32_t at = 0; at < pages; at++)
		chosen[at] = SPARE * pages - 1 - 2 * at;
	OK(drdma_register_host(domain, chosen, 4 * pages, 0, NULL, NULL, &message));
	OK(drdma_send(connection, message, TIMEOUT, &transfer));
	finish(transfer, 4 * pages);
	for (uint32_t layer = 0; layer < layers; layer++) {
		OK(drdma_notifications_wait(connection, layer, 1, TIMEOUT));
		for (uint32_t at = 0; at < pages; at++) {
			unsigned char *there = cache + ((uint64_t)layer * SPARE * pages + chosen[at]) * page_size;

			compute(page, layer, at);
			CHECK(!memcmp(there, page, page_size));
			memcpy(ordered + at * page_size, there, page_size);
		}
		uint64_t sum = digest(ordered, pages * page_size);
		OK(drdma_notify(connection, layer, &sum, sizeof sum, TIMEOUT, &transfer));
		finish_layer(transfer, 0, layer);
	}
	linger(connection, 500);
	printf("received %u layers of %u pages, verified\n", layers, pages);
	OK(drdma_connection_unref(connection));
	OK(drdma_incoming_unref(incoming));
	OK(drdma_listener_unref(listener));
	OK(drdma_region_unref(message));
	OK(drdma_region_unref(region));
	OK(drdma_domain_unref(domain));
	free(cache);
	free(ordered);
	free(page);
	free(chosen);
}

static void prefill(const char *address)
{
	drdma_options options = { .notifications = layers + 1 };
	uint64_t size = (uint64_t)layers * pages * page_size;
	unsigned char *cache = malloc(size), reply[256];
	uint32_t *chosen = malloc(4 * pages);
	uint64_t *here = malloc(8 * pages), *there = malloc(8 * pages);
	size_t length = sizeof reply;
	drdma_domain *domain;
	drdma_region *region, *message;
	drdma_remote *remote;
	drdma_blocks *ours, *theirs, *some, *places;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_notification answer;

	OK(drdma_domain_open("rxe0", &domain));
	OK(drdma_register_host(domain, cache, size, 0, NULL, NULL, &region));
	OK(drdma_register_host(domain, chosen, 4 * pages, DRDMA_LOCAL_WRITE, NULL, NULL, &message));
	OK(drdma_connect(address, domain, &options, NULL, 0, TIMEOUT, &connection));
	OK(drdma_connection_private_data(connection, reply, &length));
	OK(drdma_remote_parse(reply, length, &remote));
	OK(drdma_recv(connection, message, TIMEOUT, &transfer));
	finish(transfer, 4 * pages);
	OK(drdma_region_strided(region, page_size, page_size, (size_t)layers * pages, &ours));
	OK(drdma_remote_strided(remote, page_size, page_size, (size_t)layers * pages * SPARE, &theirs));
	for (uint32_t layer = 0; layer < layers; layer++) {
		for (uint32_t at = 0; at < pages; at++) {
			here[at] = (uint64_t)layer * pages + at;
			there[at] = (uint64_t)layer * pages * SPARE + chosen[at];
			compute(cache + here[at] * page_size, layer, at);
		}
		OK(drdma_blocks_select(ours, here, pages, &some));
		OK(drdma_blocks_select(theirs, there, pages, &places));
		OK(drdma_write_blocks_notify(connection, some, places, layer, TIMEOUT, &transfer));
		OK(drdma_blocks_unref(some));
		OK(drdma_blocks_unref(places));
		finish_layer(transfer, pages * page_size, layer);
	}
	for (uint32_t layer = 0; layer < layers; layer++) {
		uint64_t sum = digest(cache + (uint64_t)layer * pages * page_size, pages * page_size);

		OK(drdma_notifications_take(connection, TIMEOUT, &answer));
		CHECK(answer.id == layer && answer.size == 8 && !memcmp(answer.payload, &sum, 8));
	}
	linger(connection, 5000);
	printf("pushed %u layers of %u pages, verified\n", layers, pages);
	OK(drdma_connection_unref(connection));
	OK(drdma_blocks_unref(ours));
	OK(drdma_blocks_unref(theirs));
	OK(drdma_remote_unref(remote));
	OK(drdma_region_unref(message));
	OK(drdma_region_unref(region));
	OK(drdma_domain_unref(domain));
	free(cache);
	free(chosen);
	free(here);
	free(there);
}

int main(int count, char **words)
{
	char address[200];

	if (count != 7)
		return 2;
	snprintf(address, sizeof address, "%s:%s", words[2], words[3]);
	layers = (uint32_t)atoi(words[4]);
	pages = (uint32_t)atoi(words[5]);
	page_size = (uint64_t)atoi(words[6]);
	if (!strcmp(words[1], "decode"))
		decode(address);
	else
		prefill(address);
	CHECK(drdma_live_handles() == 0);
	return 0;
}
