-- What a service in any language sends: psql -v order_id=7 -f any_language.sql
-- Its role needs no more than GRANT exarq_enqueue TO … (see docs/roles.sql).
BEGIN;
-- Whatever else this service writes belongs to the same transaction.
SELECT exarq.enqueue('orders.confirm', jsonb_build_object('order_id', :order_id), key => 'order-' || :order_id);
COMMIT;
