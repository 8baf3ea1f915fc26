/* For the tests in C, which run in a guest with the devices rxe0 and rxe1 on one wire. */
#ifndef HARNESS_H
#define HARNESS_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dmabuf_rdma.h"

/* Fails the program, with the library's words. */
#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			char why[2000]; \
			drdma_last_message(why, sizeof why); \
			fprintf(stderr, "%s:%d: %s\nlast error: %s\n", __FILE__, __LINE__, #condition, why); \
			exit(1); \
		} \
	} while (0)

#define OK(call) CHECK((call) == DRDMA_OK)

/* The call is refused with a status, and the message has these words. */
#define REFUSED(call, status, words) \
	do { \
		CHECK((call) == (status) && drdma_last_status() == (status)); \
		CHECK(says(words)); \
	} while (0)

#define MISUSE(call, words) REFUSED(call, DRDMA_MISUSE, words)

/* Whether the last message has these words, and there is a hint. */
static inline int says(const char *words)
{
	char told[2000];

	return drdma_last_hint(told, sizeof told) > 0 && drdma_last_message(told, sizeof told) > 0 &&
	       strstr(told, words) != NULL;
}

static inline int open_descriptors(void)
{
	DIR *folder = opendir("/proc/self/fd");
	int count = 0;

	while (readdir(folder))
		count++;
	closedir(folder);
	return count;
}

/* Runs a test, which must leave no handle and no descriptor. */
#define RUN(test) \
	do { \
		int before = open_descriptors(); \
		test(); \
		CHECK(drdma_live_handles() == 0); \
		CHECK(open_descriptors() == before); \
		printf("  %s\n", #test); \
	} while (0)

/* Two connected ends on the two devices. */
struct pair {
	drdma_domain *near_domain, *far_domain;
	drdma_connection *near, *far;
};

static inline void join(drdma_connection *near, drdma_connection *far)
{
	unsigned char one[DRDMA_ENDPOINT_BYTES], other[DRDMA_ENDPOINT_BYTES];

	OK(drdma_connection_endpoint(near, one));
	OK(drdma_connection_endpoint(far, other));
	OK(drdma_connection_connect(near, other));
	OK(drdma_connection_connect(far, one));
}

static inline struct pair make_pair(const drdma_options *options)
{
	struct pair pair;

	OK(drdma_domain_open("rxe0", &pair.near_domain));
	OK(drdma_domain_open("rxe1", &pair.far_domain));
	OK(drdma_connection_new(pair.near_domain, options, &pair.near));
	OK(drdma_connection_new(pair.far_domain, options, &pair.far));
	join(pair.near, pair.far);
	return pair;
}

static inline void release_pair(struct pair pair)
{
	OK(drdma_connection_unref(pair.near));
	OK(drdma_connection_unref(pair.far));
	OK(drdma_domain_unref(pair.near_domain));
	OK(drdma_domain_unref(pair.far_domain));
}

/* The peer's view of a region, through the bytes of its description. */
static inline drdma_remote *described(drdma_region *region)
{
	unsigned char bytes[512];
	size_t size = sizeof bytes;
	drdma_remote *remote;

	OK(drdma_region_describe(region, bytes, &size));
	OK(drdma_remote_parse(bytes, size, &remote));
	return remote;
}

static inline void finish(drdma_transfer *transfer, uint64_t expected)
{
	uint64_t bytes;

	OK(drdma_transfer_wait(transfer, 30000, &bytes));
	CHECK(bytes == expected && drdma_transfer_progress(transfer) == expected);
	OK(drdma_transfer_try(transfer));
	OK(drdma_transfer_unref(transfer));
}

static inline void fill(unsigned char *bytes, size_t count, unsigned int seed)
{
	for (size_t i = 0; i < count; i++)
		bytes[i] = (unsigned char)((i + seed) * 2654435761u >> 11);
}

#endif
