/* What the examples share: they say what failed, and end. */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <stdio.h>
#include <stdlib.h>

#include <dmabuf_rdma.h>

enum { TIMEOUT = 60000 };

static void check(drdma_status status, const char *what)
{
	char why[1000];

	if (status == DRDMA_OK)
		return;
	drdma_last_message(why, sizeof why);
	fprintf(stderr, "%s: %s\n", what, why);
	drdma_last_hint(why, sizeof why);
	fprintf(stderr, "  %s\n", why);
	exit(1);
}

/* Bytes that differ from place to place. */
static inline unsigned char byte(size_t at)
{
	return (unsigned char)((at * 2654435761u) >> 7);
}

#endif
