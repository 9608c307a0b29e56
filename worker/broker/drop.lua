-- Remove hints whose jobs wait no longer, unless somebody has scored them anew since they were taken.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- ARGV[1] prefix of the payload keys
-- ARGV[2…] for each hint: job id, the score that its claim wrote
-- returns how many hints were removed
local dropped = 0
for i = 2, #ARGV, 2 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not score then
    -- The hint was evicted: its payload is of no use to anybody.
    redis.call('DEL', ARGV[1] .. ARGV[i])
  elseif tonumber(score) == tonumber(ARGV[i + 1]) then
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('DEL', ARGV[1] .. ARGV[i])
    dropped = dropped + 1
  end
end
return dropped
